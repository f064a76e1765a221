"""A Gram that several processes take together: each reads a range of the trajectory's units.

What a unit gives is added up in the order of the units, so the bits are those of one process. A range that is lost with
its worker is taken again by another one.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from safetensors.torch import load, save

from relex import kernel
from relex.errors import CheckpointChangedError, CheckpointError
from relex.files.block_cache import BlockCache
from relex.products import Taken, precision, take
from relex.streaming import Unit, units
from relex.trajectory import Trajectory, open_again

# Bytes that are read for one range: seconds of work, so that one more or less is no matter.
RANGE_BYTES: Final = 8 << 30


@dataclass(frozen=True)
class Range:
    """Units number `start` to `stop` of a trajectory that another process opens where it lies.

    `inputs` names the files that are read; products are taken in `precision`, from row `first` on.
    """

    base: str
    steps: tuple[int, ...]
    checkpoints: tuple[str, ...]
    inputs: str
    start: int
    stop: int
    first: int
    precision: str
    memory: int
    threads: int


Share = Callable[[Sequence[Range]], Iterable[bytes]]
"""Calls `measure_range` on every range, anywhere, and yields what it returned in their order; raises what it raised."""


def shared(
    trajectory: Trajectory, pieces: Sequence[Unit], share: Share, *, first: int, memory: int, threads: int
) -> Generator[tuple[Unit, Taken], None, None]:
    """Yield what `products.take` does, of the same bits, taken by other processes."""
    ranges = [
        Range(
            str(trajectory.base.directory),
            trajectory.steps,
            tuple(str(checkpoint.weights.directory) for checkpoint in trajectory.checkpoints),
            trajectory.inputs,
            start,
            stop,
            first,
            precision(trajectory),
            memory,
            threads,
        )
        for start, stop in _cut(trajectory, pieces)
    ]
    for one, content in zip(ranges, share(ranges), strict=True):
        yield from zip(pieces[one.start : one.stop], _from_bytes(content), strict=True)


def measure_range(given: Range, *, blocks: BlockCache | None = None) -> bytes:
    """Take one range and return it as bytes.

    `blocks` is where what is read from a URL is kept meanwhile. Raises CheckpointChangedError when the files are not
    those that the range was planned with, CheckpointError where the loops in C are missing or there are too many.
    """
    trajectory = open_again(given.base, given.steps, given.checkpoints, blocks=blocks)
    if trajectory.inputs != given.inputs:
        raise CheckpointChangedError(
            f"the base {given.base} or a checkpoint of steps {given.steps[0]} to {given.steps[-1]} is not what it was"
            f" when its range was planned (files {trajectory.inputs[:12]}…, then {given.inputs[:12]}…). Was the run"
            " resumed, or is it mounted elsewhere on this machine? Run again when it is quiet."
        )
    here = precision(trajectory)
    if here != given.precision:
        raise CheckpointError(
            f"this worker takes products in {here}, and the others in {given.precision}: relex/_kernel.c is"
            f" {'built' if kernel.BUILT else 'not built'} here. Install relex in the same way on every machine."
        )
    pieces = units(trajectory)[given.start : given.stop]
    made = [one for _, one in take(trajectory, pieces, first=given.first, memory=given.memory, threads=given.threads)]
    trajectory.check_unchanged()
    return _to_bytes(made)


def _cut(trajectory: Trajectory, pieces: Sequence[Unit]) -> list[tuple[int, int]]:
    """Return the first and the last but one unit of every range."""
    limits = [0]
    filled = 0
    for number, unit in enumerate(pieces):
        spec = trajectory.tensors[unit.tensor]
        size = (unit.stop - unit.start) * (spec.base.dtype.itemsize + len(spec.entries) * spec.dtype.itemsize)
        if filled and filled + size > RANGE_BYTES:
            limits.append(number)
            filled = 0
        filled += size
    return list(zip(limits, [*limits[1:], len(pieces)], strict=True))


def _to_bytes(made: Sequence[Taken]) -> bytes:
    erased = [(number, row) for number, one in enumerate(made) for row in one.erased]
    return save(
        {
            "products": torch.stack([one.products for one in made]).contiguous(),
            "base_norms": torch.tensor([one.base_norm for one in made], dtype=torch.float64),
            "digests": torch.stack([torch.frombuffer(bytearray(one.digests), dtype=torch.uint8) for one in made]),
            "erased": torch.tensor(erased, dtype=torch.int64).view(-1, 2),
        }
    )


def _from_bytes(content: bytes) -> list[Taken]:
    held = load(content)
    erased = held["erased"].tolist()
    return [
        Taken(products, norm, bytes(digests.tolist()), tuple(row for unit, row in erased if unit == number))
        for number, (products, norm, digests) in enumerate(
            zip(held["products"], held["base_norms"].tolist(), held["digests"], strict=True)
        )
    ]
