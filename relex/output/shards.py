"""The shards of predictions: how tensors are dealt out to files, and how a file is filled, here or in another process.

A shard is a piece of work that any process can do that sees the same file systems: what it needs lies in the hidden
siblings of the outputs. It is complete or absent, and its bytes do not depend on who writes it or how often.

The sum of a chunk is taken checkpoint by checkpoint rather than as a matrix product, whose order of additions depends
on its shape: so the bytes of a prediction do not depend on what else is asked for at once (see `combine`).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from relex import kernel
from relex.contents import SecondReading
from relex.errors import CheckpointChangedError, NonFiniteError, OutputError
from relex.files.block_cache import BlockCache
from relex.forecast import Forecast, TensorForecast
from relex.layouts.hf import SINGLE_FILE
from relex.output import manifest
from relex.output.combine import chunks, needed_rows, predicted
from relex.output.manifest import Manifest
from relex.output.writer import ModelWriter, OutputTensor, join_writer
from relex.progress import Progress
from relex.rank_one import RankOne
from relex.streaming import CHUNK, Block, Unit, Workspace, as_bytes, in_order, units, workspaces
from relex.trajectory import TensorSpec, Trajectory, open_again

# Beside the shards until they are published, with what is unfinished.
_CONTENTS = "contents.tmp"


@dataclass(frozen=True)
class Shard:
    """One file of every output that lacks it, as a piece of work within `memory` bytes.

    `partials` are the hidden siblings of the outputs, where `write_shard` finds what it needs; `inputs` names the files
    that are read.
    """

    file: str
    partials: tuple[str, ...]
    inputs: str
    memory: int
    threads: int


Spread = Callable[[Sequence[Shard], Progress | None], None]
"""Calls `write_shard` on every shard, anywhere, and returns when all are written; raises what one of them raised."""


def output_tensors(trajectory: Trajectory, dtype: str, shard_size: int | None) -> list[OutputTensor]:
    """Deal the tensors, stored as `dtype` ("base": as the base's), out to the base's files.

    With a `shard_size`: to files of at most so many bytes, in the base's order, a larger tensor alone in one.
    """
    override = None if dtype == "base" else getattr(torch, dtype)
    # Of experts that are stored fused, the first matrix stands for the tensor.
    tensors = [_output_tensor(spec, override) for spec in trajectory.tensors if spec.start == 0]
    if shard_size is None:
        return tensors
    places, number, filled = [], 0, 0
    for tensor in tensors:
        if filled and filled + tensor.nbytes > shard_size:
            number, filled = number + 1, 0
        places.append(number)
        filled += tensor.nbytes
    count = number + 1
    names = [f"model-{place + 1:05}-of-{count:05}.safetensors" if count > 1 else SINGLE_FILE for place in places]
    return [replace(tensor, shard=name) for tensor, name in zip(tensors, names, strict=True)]


def _output_tensor(spec: TensorSpec, override: torch.dtype | None) -> OutputTensor:
    dtype = override if override is not None and spec.moves else spec.base.dtype
    stored = spec.stored
    size = math.prod(stored.shape) * dtype.itemsize
    return OutputTensor(stored.name, dtype, stored.shape, size, stored.pieces[0].file)


@dataclass(frozen=True)
class Part:
    """One tensor of one prediction: how it is made, where it goes, and what is told of it when it cannot be stored."""

    made: TensorForecast
    writer: ModelWriter
    prediction: str
    vectors: RankOne | None = None

    @classmethod
    def of(cls, forecast: Forecast, name: str, writer: ModelWriter) -> "Part":
        """Take one tensor out of a forecast."""
        vectors = forecast.vectors.get(name)
        prediction = f"predicted at step {forecast.target_step} by {forecast.method}"
        return cls(forecast.tensors[name], writer, prediction, vectors)


def write_unit(reading: SecondReading, space: Workspace, unit: Unit, parts: Sequence[Part]) -> None:
    """Read one unit again and write what all predictions make of it.

    Raises NonFiniteError when one leaves the range of its precision, CheckpointChangedError.
    """
    spec = reading.trajectory.tensors[unit.tensor]
    needed = rows_of(spec, parts)
    for block in reading.blocks(space, unit, needed):
        in_c = [part for part in parts if _is_summed(part, block, spec)]
        for place, rows_RN in space.rows(block) if in_c else ():
            for part in in_c:
                dtype = part.writer.tensors[spec.stored.name].dtype
                values = [part.made.coefficients[row] for row in needed]
                chunk = torch.empty(rows_RN.rows.shape[1], dtype=dtype)
                if not kernel.combine(rows_RN, block.base[place], coefficients=torch.tensor(values), out=chunk):
                    raise _leaves_the_range(spec.name, part, dtype)
                begin = spec.start + block.start + place.start
                part.writer.write(spec.stored.name, begin * dtype.itemsize, as_bytes(chunk))
        others = [part for part in parts if not _is_summed(part, block, spec)]
        for place, deltas in chunks(space, block, spec) if others else ():
            for part in others:
                dtype = part.writer.tensors[spec.stored.name].dtype
                base, stored = block.base[place], None if spec.relative else block.stored[:, place]
                start = block.start + place.start
                added = part.vectors.elements(start, start + len(base), dtype=deltas.dtype) if part.vectors else None
                chunk = predicted(part.made, needed, base, stored=stored, deltas=deltas, added=added).to(dtype)
                # What was read is finite; a copy too may not be in a narrower precision.
                if not bool(torch.isfinite(chunk).all()):
                    raise _leaves_the_range(spec.name, part, dtype)
                part.writer.write(spec.stored.name, (spec.start + start) * dtype.itemsize, as_bytes(chunk))


def rows_of(spec: TensorSpec, parts: Sequence[Part]) -> list[int]:
    """Return the numbers of the checkpoints that one tensor is made from."""
    return sorted({row for part in parts for row in needed_rows(part.made, len(spec.entries))})


def fill(
    trajectory: Trajectory,
    forecasts: Sequence[Forecast],
    writers: Mapping[int, ModelWriter],
    *,
    contents: Tensor | None,
    memory: int,
    threads: int,
    only: str | None = None,
    on_progress: Progress | None = None,
) -> None:
    """Write the shards that are missing, or `only` the one of that name, of every forecast that has a writer.

    One pass that compares what it reads with `contents` (see `SecondReading`), within `memory` bytes. Raises
    NonFiniteError when a prediction leaves the range of its precision, CheckpointChangedError, MemoryBudgetError.
    """
    tensors = trajectory.tensors
    # Which outputs a tensor still goes to is fixed before the first byte: shards are finished while others are written.
    filling = {
        spec.name: [
            Part.of(forecasts[i], spec.name, writer)
            for i, writer in writers.items()
            if (only is None or writer.tensors[spec.stored.name].shard == only) and writer.pending(spec.stored.name)
        ]
        for spec in tensors
    }
    # Backwards: what the pass before this one read last is still in the page cache, and what it read first may not be.
    pieces = [unit for unit in reversed(units(trajectory)) if filling[tensors[unit.tensor].name]]
    if not pieces:
        return
    most = max(len(rows_of(spec, filling[spec.name])) for spec in tensors)
    spaces = workspaces(trajectory, most, memory=memory, threads=threads, extra=2 * CHUNK * 8)
    reading = SecondReading(trajectory, contents)

    def work(space: Workspace, unit: Unit) -> None:
        write_unit(reading, space, unit, filling[tensors[unit.tensor].name])

    last: dict[tuple[int, str], tuple[Unit, ModelWriter]] = {}
    for unit in pieces:
        spec = tensors[unit.tensor]
        for part in filling[spec.name]:
            part.writer.begin(spec.stored.name)
            last[id(part.writer), part.writer.tensors[spec.stored.name].shard] = unit, part.writer
    total = sum(unit.stop - unit.start for unit in pieces)
    done = 0
    # Nobody writes any more once this is left, however it is.
    with closing(in_order(work, pieces, spaces)) as written:
        for unit, _ in written:
            for (_, shard), (final, writer) in last.items():
                if final is unit:
                    writer.close(shard)
            done += unit.stop - unit.start
            if on_progress is not None:
                on_progress(done, total)


def _is_summed(part: Part, block: Block, spec: TensorSpec) -> bool:
    """Whether the loops in C make the sum: the same to the bit, and faster."""
    stored = (block.base.dtype, block.stored.dtype)
    dtype = part.writer.tensors[spec.stored.name].dtype
    return kernel.BUILT and dtype in kernel.DTYPES and torch.float64 not in stored and part.made.source == "combined"


def _leaves_the_range(name: str, part: Part, dtype: torch.dtype) -> NonFiniteError:
    return NonFiniteError(
        f"{name} {part.prediction} leaves the range of {dtype}. Give a nearer target, or a --dtype of wider range."
    )


def missing_shards(trajectory: Trajectory, writers: Sequence[ModelWriter], *, memory: int, threads: int) -> list[Shard]:
    """Return the shards that are to be written, each with all the outputs that lack it."""
    lacking: dict[str, list[str]] = {}
    for writer in writers:
        for file in writer.missing:
            lacking.setdefault(file, []).append(str(writer.partial))
    inputs = trajectory.inputs
    return [Shard(file, tuple(partials), inputs, memory, threads) for file, partials in sorted(lacking.items())]


def announced(contents: Tensor | None) -> dict[str, bytes]:
    """Return the file by which other processes know what the trajectory held (see `SecondReading`)."""
    return {} if contents is None else {_CONTENTS: save({"contents": contents.contiguous()})}


def _read_contents(partial: Path) -> Tensor | None:
    try:
        return load((partial / _CONTENTS).read_bytes())["contents"]
    except FileNotFoundError:
        return None


def write_shard(shard: Shard, *, blocks: BlockCache | None = None) -> None:
    """Write one shard of every output that still lacks it.

    `blocks` is where what is read from a URL is kept meanwhile. Raises CheckpointChangedError when the files are not
    those the shard was planned with, OutputError when nobody waits for it any more, and what `fill` raises.
    """
    for partial in shard.partials:
        if not Path(partial).is_dir():
            raise OutputError(
                f"{partial} is not there: nobody waits for {shard.file} any more, or this machine does not see the file"
                " system of the outputs. Mount it under the same path."
            )
    plans = [manifest.read(partial) for partial in shard.partials]
    trajectory = reopen(plans[0], blocks=blocks)
    inputs = trajectory.inputs
    if inputs != shard.inputs:
        raise CheckpointChangedError(
            f"the base {plans[0].base} or a checkpoint of steps {trajectory.steps[0]} to {trajectory.steps[-1]} is not"
            f" what it was when {shard.file} was planned (files {inputs[:12]}…, then {shard.inputs[:12]}…). Was the run"
            " resumed, or is it mounted elsewhere on this machine? Run again when it is quiet."
        )
    forecasts = [
        manifest.with_vectors(plan.forecast, Path(partial)) for plan, partial in zip(plans, shard.partials, strict=True)
    ]
    contents = _read_contents(Path(shard.partials[0]))
    writers = {
        index: join_writer(Path(partial), output_tensors(trajectory, plan.forecast.dtype, plan.shard_size))
        for index, (plan, partial) in enumerate(zip(plans, shard.partials, strict=True))
    }
    try:
        fill(
            trajectory,
            forecasts,
            writers,
            contents=contents,
            memory=shard.memory,
            threads=shard.threads,
            only=shard.file,
        )
    finally:
        for writer in writers.values():
            writer.release()


def reopen(plan: Manifest, *, blocks: BlockCache | None = None) -> Trajectory:
    """Open the base and the checkpoints that a manifest names, where they lay, with the tensors it names."""
    forecast = plan.forecast
    return open_again(plan.base, forecast.steps, plan.checkpoints, whole=forecast.tensors, blocks=blocks)
