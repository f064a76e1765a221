"""Predicted weights as model directories: coefficients times trajectory, many predictions in one pass.

Per chunk: the deltas once, then for each prediction the sum over its checkpoints in step order, in fp32, on the base,
rounded once. The sum is taken checkpoint by checkpoint rather than as a matrix product, whose order of additions
depends on its shape: so the bytes of a prediction do not depend on what else is asked for at once (see `combine`).
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from relex import manifest, outer
from relex.adapter import write_adapter
from relex.combine import chunks, needed_rows, predicted
from relex.errors import NonFiniteError, OutputError, RelexError
from relex.forecast import Forecast
from relex.layouts.detection import open_any
from relex.layouts.files import open_directory
from relex.manifest import FileRecord
from relex.store import Checkpoint, open_base
from relex.streaming import (
    CHUNK,
    Progress,
    Unit,
    Workspace,
    as_bytes,
    in_order,
    units,
    workspaces,
)
from relex.trajectory import TensorSpec, Trajectory, open_trajectory
from relex.writer import ModelWriter, OutputTensor, open_writer, side_files


@dataclass(frozen=True)
class Output:
    """One prediction and the directory it becomes."""

    forecast: Forecast
    directory: Path


def materialise(
    trajectory: Trajectory,
    outputs: Sequence[Output],
    *,
    memory: int,
    threads: int,
    command: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> None:
    """Write every output that is not there yet, in one pass within `memory` bytes, going on after a killed call.

    Raises OutputError when a directory holds something else, NonFiniteError when a prediction leaves the range of its
    precision, CheckpointChangedError when an input changed meanwhile
    (then nothing is left behind).
    """
    writers: dict[int, ModelWriter] = {}
    try:
        for index, output in enumerate(outputs):
            writer = open_writer(output.directory, output.forecast.digest, _output_tensors(trajectory, output.forecast))
            if writer is not None:
                writers[index] = writer
        _combine(trajectory, outputs, writers, memory=memory, threads=threads, on_progress=on_progress)
        trajectory.check_unchanged()
        for index, writer in writers.items():
            forecast = outputs[index].forecast
            files = side_files(trajectory.base, trajectory.checkpoints[-1].weights)
            if forecast.dtype != "base":
                config = json.loads(files["config.json"]) | {"dtype": forecast.dtype}
                files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
            if forecast.vectors:
                files[outer.FILE_NAME] = outer.to_bytes(forecast.vectors)
            writer.publish(files, partial(_manifest, forecast, trajectory, command))
    except RelexError:
        for writer in writers.values():
            if writer.partial.exists():
                writer.discard()
        raise
    finally:
        for writer in writers.values():
            writer.release()


def _manifest(
    forecast: Forecast, trajectory: Trajectory, command: Sequence[str], files: Mapping[str, FileRecord]
) -> dict[str, Any]:
    return manifest.make(forecast, trajectory, files, command=command).to_json()


def _combine(
    trajectory: Trajectory,
    outputs: Sequence[Output],
    writers: Mapping[int, ModelWriter],
    *,
    memory: int,
    threads: int,
    on_progress: Progress | None,
) -> None:
    tensors = trajectory.tensors
    # Which outputs a tensor still goes to is fixed before the first byte: shards are finished while others are written.
    filling = {spec.name: [i for i, writer in writers.items() if writer.pending(spec.name)] for spec in tensors}
    pieces = [unit for unit in units(trajectory) if filling[tensors[unit.tensor].name]]
    rows = {
        index: sorted(
            {
                row
                for i in filling[spec.name]
                for row in needed_rows(outputs[i].forecast.tensors[spec.name], len(spec.entries))
            }
        )
        for index, spec in enumerate(tensors)
    }
    if not pieces:
        return
    spaces = workspaces(
        trajectory, max(len(needed) for needed in rows.values()), memory=memory, threads=threads, extra=2 * CHUNK * 8
    )

    def work(space: Workspace, unit: Unit) -> None:
        spec = tensors[unit.tensor]
        needed = rows[unit.tensor]
        for block in space.blocks(trajectory, unit, needed):
            for place, deltas in chunks(space, block, spec):
                for i in filling[spec.name]:
                    item, writer = outputs[i].forecast.tensors[spec.name], writers[i]
                    dtype = writer.tensors[spec.name].dtype
                    base, stored = block.base[place], None if spec.relative else block.stored[:, place]
                    vectors = outputs[i].forecast.vectors.get(spec.name)
                    start = block.start + place.start
                    added = vectors.elements(start, start + len(base), dtype=deltas.dtype) if vectors else None
                    chunk = predicted(item, needed, base, stored=stored, deltas=deltas, added=added).to(dtype)
                    if (item.source in ("combined", "rank-one") or spec.relative) and not bool(
                        torch.isfinite(chunk).all()
                    ):
                        raise NonFiniteError(
                            f"{spec.name} predicted at step {outputs[i].forecast.target_step} by"
                            f" {outputs[i].forecast.method} leaves the range of {dtype}. Give a nearer target, or a"
                            " --dtype of wider range."
                        )
                    writer.write(spec.name, start * dtype.itemsize, as_bytes(chunk))

    last: dict[tuple[int, str], Unit] = {}
    for unit in pieces:
        name = tensors[unit.tensor].name
        for i in filling[name]:
            writers[i].begin(name)
            last[i, writers[i].tensors[name].shard] = unit
    total = sum(unit.stop - unit.start for unit in pieces)
    done = 0
    for unit, _ in in_order(work, pieces, spaces):
        for (i, shard), final in last.items():
            if final is unit:
                writers[i].close(shard)
        done += unit.stop - unit.start
        if on_progress is not None:
            on_progress(done, total)


def _output_tensors(trajectory: Trajectory, forecast: Forecast) -> list[OutputTensor]:
    override = None if forecast.dtype == "base" else getattr(torch, forecast.dtype)
    return [_output_tensor(spec, override) for spec in trajectory.tensors]


def _output_tensor(spec: TensorSpec, override: torch.dtype | None) -> OutputTensor:
    dtype = override if override is not None and spec.moves else spec.base.dtype
    return OutputTensor(spec.name, dtype, spec.base.shape, spec.count * dtype.itemsize, spec.base.pieces[0].file)


def rebuild(directory: Path, out: Path, *, memory: int, threads: int) -> None:
    """Build the model that the manifest in `directory` describes once more, into `out`, and compare every file with it.

    The base and the checkpoints must still lie where they did. Raises OutputError when `out` exists, or when a file
    comes out different, which means an input has changed; `out` is then removed.
    """
    old = manifest.read(directory)
    if out.exists():
        raise OutputError(f"output {out} exists; to rebuild {directory} is to write it afresh. Give another directory.")
    base = open_base(old.base)
    checkpoints = [
        Checkpoint(step, open_any(open_directory(location), base=base))
        for step, location in zip(old.forecast.steps, old.checkpoints, strict=True)
    ]
    trajectory = open_trajectory(base, checkpoints)
    forecast = manifest.with_vectors(old.forecast, directory)
    if old.adapter is not None:
        write_adapter(trajectory, forecast, out, memory=memory, threads=threads, command=old.command)
    else:
        materialise(trajectory, [Output(forecast, out)], memory=memory, threads=threads, command=old.command)
    new = manifest.read(out)
    for name in sorted(old.files.keys() | new.files.keys()):
        was, now = old.files.get(name), new.files.get(name)
        if was != now:
            shutil.rmtree(out)
            raise OutputError(
                f"{directory / name} comes out with {_described(now)} and was {_described(was)}: a checkpoint or the"
                " base is not what it was. Bring the old ones back, or predict again."
            )


def _described(record: FileRecord | None) -> str:
    return "no file" if record is None else f"{record.size} bytes, sha256 {record.sha256[:12]}…"
