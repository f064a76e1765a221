"""What a trajectory held, unit by unit, when its Gram was taken: so a later pass notices that it reads other bytes.

Files say by size and times whether they changed, and not all stores keep the time of the last change: a file that was
written again with its size and time put back would give a prediction of old products and new weights.

Shape suffixes: U = units of the trajectory, R = rows: the base, then the checkpoints, D = bytes of a digest.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import xxhash
from torch import Tensor

from relex.errors import ContentChangedError
from relex.layouts.factors import AdapterWeights, LowRank
from relex.streaming import CHUNK, Block, Unit, Workspace, as_bytes, units
from relex.trajectory import Trajectory

DIGEST_BYTES = 16


class Hash(Protocol):
    """What takes bytes in."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Go on with `data`."""


def put_down(contents_URD: Tensor, number: int, digests: bytes) -> None:
    """Keep what unit `number` held: the digests of its rows, one after the other."""
    contents_URD[number] = torch.frombuffer(bytearray(digests), dtype=torch.uint8).view(-1, DIGEST_BYTES)


@dataclass(frozen=True)
class SecondReading:
    """A trajectory read again; `digests` (U, R, 16) say what its units held, None where nobody knows."""

    trajectory: Trajectory
    digests: Tensor | None

    @cached_property
    def _numbers(self) -> dict[Unit, int]:
        return {unit: number for number, unit in enumerate(units(self.trajectory))}

    def blocks(self, space: Workspace, unit: Unit, rows: Sequence[int]) -> Iterator[Block]:
        """Yield what `Workspace.blocks` does; ContentChangedError after it where the bytes are not what they were.

        Of an adapted tensor its factors are compared.
        """
        if self.digests is None:
            yield from space.blocks(self.trajectory, unit, rows)
            return
        spec = self.trajectory.tensors[unit.tensor]
        self.check_factors(unit, rows)
        hashes = [xxhash.xxh3_128() for _ in range(1 + len(rows))]
        for block in space.blocks(self.trajectory, unit, rows):
            for digest, raw in zip(hashes, block.raw[: 1 if spec.relative else None], strict=False):
                digest.update(raw)
            yield block
        compared = (0,) if spec.relative or spec.unchanged else (0, *(1 + row for row in rows))
        for digest, row in zip(hashes, compared, strict=False):
            self._compare(unit, row, digest.digest())

    def check_factors(self, unit: Unit, rows: Sequence[int]) -> None:
        """Compare the factors of an adapted tensor, with its first unit; of another tensor there are none."""
        spec = self.trajectory.tensors[unit.tensor]
        if self.digests is None or not spec.relative or unit.start != 0:
            return
        for row in rows:
            digest = xxhash.xxh3_128()
            read_factors(self.trajectory.adapters[row], spec.adapted[row], digest)
            self._compare(unit, 1 + row, digest.digest())

    def _compare(self, unit: Unit, row: int, digest: bytes) -> None:
        if self.digests is None or bytes(self.digests[self._numbers[unit], row].tolist()) == digest:
            return
        name = self.trajectory.tensors[unit.tensor].name
        where = f"base {self.trajectory.base.directory}"
        if row > 0:
            checkpoint = self.trajectory.checkpoints[row - 1]
            where = f"{checkpoint.weights.directory} (step {checkpoint.step})"
        raise ContentChangedError(
            f"{where}: {name} holds other bytes from element {unit.start} on than when its products were taken, under"
            " the same size and time. Was the file written again? Run again: the products are taken afresh."
        )


def describe_factors(entry: LowRank) -> bytes:
    """Return what the digest of an adapted tensor begins with: its scale and the shapes of its parts."""
    return f"{entry.scale!r} {[list(part.shape) for part in entry.parts]}".encode()


def read_factors(weights: AdapterWeights, entry: LowRank, digest: Hash) -> None:
    """Put what one checkpoint stores of an adapted tensor into `digest`, part by part."""
    digest.update(describe_factors(entry))
    for part in entry.parts:
        count = math.prod(part.shape)
        for start in range(0, count, CHUNK):
            digest.update(as_bytes(weights.elements(part, start, min(start + CHUNK, count))))
