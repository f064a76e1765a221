"""What one unit of a trajectory gives to its Gram: products of increments, the base's norm, digests, lost stretches.

Shape suffixes: K = checkpoints, R = those of a block, N = elements.
"""

from collections import deque
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from relex import factor_gram, kernel
from relex.streaming import CHUNK, Block, Job, Unit, Workspace, in_order, workspaces
from relex.trajectory import TensorSpec, Trajectory

# Products are taken in tiles of fixed shape: the bits of G[i, j] then do not depend on how many checkpoints there are,
# and an extended Gram equals one made afresh. 4 rows by 24 columns is what small-matrix kernels of OpenBLAS like best.
ROWS, COLUMNS = 4, 24
# Columns of one product: with these shapes it needs no packing, which is 2.4 times faster than twice as many.
WIDTH = 1 << 13
# What a file system gives back for a part that it lost: whole sectors of zeros.
_SECTOR_BYTES = 512
# Where a tensor begins or ends less than a sector of it may be lost; fewer zeros than this may be chance.
_FEWEST_ZEROS = 4


@dataclass(frozen=True)
class Taken:
    """What was taken from one unit.

    `products` (K, K) fp64 are of increments, of deltas where they were taken between factors, and only the lower
    triangle is filled. `digests` are those of the base and of every checkpoint, one after the other, `erased` the rows
    in which a stretch was lost.
    """

    products: Tensor
    base_norm: float
    digests: bytes
    erased: tuple[int, ...]


def take(
    trajectory: Trajectory,
    pieces: Sequence[Unit],
    *,
    first: int,
    memory: int,
    threads: int,
    urgent: deque[Job] | None = None,
) -> Generator[tuple[Unit, Taken], None, None]:
    """Read these units within `memory` bytes and yield what they give, in order; products from row `first` on.

    Meanwhile the threads do what is put into `urgent` (see `in_order`); their buffers hold all checkpoints.
    """
    count = len(trajectory.checkpoints)
    padded = -(-count // ROWS) * ROWS
    multiplying = max(2 * padded * WIDTH * 8, kernel.scratch(count))
    extra = multiplying + max(factor_gram.memory(spec) for spec in trajectory.tensors)
    spaces = workspaces(trajectory, count, memory=memory, threads=threads, extra=extra)

    def work(space: Workspace, unit: Unit) -> Taken:
        part = torch.zeros(padded, padded, dtype=torch.float64)
        base_norm = 0.0
        digests = [xxhash.xxh3_128() for _ in range(count + 1)]
        erased: list[int] = []
        spec = trajectory.tensors[unit.tensor]
        rows = read_rows(spec)
        multiplied = _in_c if _is_fp32(spec) else _in_fp64
        ends = [] if spec.relative else _file_ends(trajectory, spec, unit, range(rows))
        scratch = torch.zeros(kernel.scratch(count) if _is_fp32(spec) else 2 * padded * WIDTH * 8, dtype=torch.uint8)
        if spec.relative and unit.start == 0:
            erased += factor_gram.read_parts(trajectory, spec, digests[1:], erased=_erased)
            if not rows:
                part[:count, :count] = factor_gram.products(trajectory, spec, first=first)
        for block in space.blocks(trajectory, unit, range(rows)):
            for digest, raw in zip(digests, block.raw[: 1 if spec.relative else None], strict=False):
                digest.update(raw)
            if not spec.moves:
                continue
            norm, suspects = multiplied(space, block, part, scratch, first)
            base_norm += norm
            erased += [] if spec.relative else suspects
            erased += [row for row, end in ends if _is_cut(block, row, end)]
        return Taken(part[:count, :count], base_norm, b"".join(digest.digest() for digest in digests), tuple(erased))

    return in_order(work, pieces, spaces, urgent=urgent)


def read_rows(spec: TensorSpec) -> int:
    """Return of how many checkpoints the elements of a tensor are read, beside the base's."""
    return 0 if spec.unchanged or factor_gram.pays(spec) else len(spec.entries)


def precision(trajectory: Trajectory) -> str:
    """Return in which precision products of large tensors are taken here, by what is built and by what is stored."""
    return "fp32" if any(map(_is_fp32, trajectory.tensors)) else "fp64"


def _is_fp32(spec: TensorSpec) -> bool:
    """Whether a tensor is multiplied by the loops in C: of fp64 weights every digit is kept."""
    exact = torch.float64 in (spec.base.dtype, spec.dtype)
    return kernel.BUILT and spec.moves and spec.count >= kernel.FEWEST and not exact and read_rows(spec) > 0


def _in_c(space: Workspace, block: Block, part: Tensor, scratch: Tensor, first: int) -> tuple[float, list[int]]:
    """Add one block's products to `part`; return the base's squared norm, and the rows that lost a sector."""
    norm = 0.0
    lost: list[int] = []
    for place, rows in space.rows(block):
        base = block.base[place]
        square, suspects = kernel.gram(rows, base, first=first, total=part, scratch=scratch)
        norm += square
        for row, stretch in suspects:
            stored, begin = block.stored[row, place], stretch * CHUNK
            lost += [row] if _lost(stored[begin : begin + CHUNK], base[begin : begin + CHUNK]) else []
    return norm, lost


def _in_fp64(_: Workspace, block: Block, part: Tensor, scratch: Tensor, first: int) -> tuple[float, list[int]]:
    """Do the same by BLAS, in fp64 throughout; of a tensor that is not read only the base's norm is taken."""
    norm = 0.0
    lost: list[int] = []
    count = len(block.stored)
    values, increments = scratch.view(torch.float64).view(2, len(part), WIDTH)
    for begin in range(0, len(block.base), CHUNK):
        chunk = slice(begin, min(begin + CHUNK, len(block.base)))
        base = block.base[chunk].double()
        norm += float(base @ base)
        if count and not block.relative:
            lost += _erased(block.stored[:, chunk], block.base[chunk])
        for start in range(chunk.start, chunk.stop, WIDTH) if count else ():
            place = slice(start, min(start + WIDTH, chunk.stop))
            width = place.stop - start
            values[:count, :width].copy_(block.stored[:, place])
            torch.sub(values[1:count, :width], values[: count - 1, :width], out=increments[1:count, :width])
            increments[0, :width].copy_(values[0, :width])
            if not block.relative:
                increments[0, :width].sub_(block.subtracted(place).double())
            _add_products(part.numpy(), increments[:, :width].numpy(), first=first)
    return norm, lost


def _add_products(total: NDArray[np.float64], deltas: NDArray[np.float64], *, first: int) -> None:
    """Add the lower triangle of deltas @ deltas.T to `total`, from the tile of row `first` on."""
    # What is not finite is named once the pass is over.
    with np.errstate(invalid="ignore"):
        for top in range(first // ROWS * ROWS, len(deltas), ROWS):
            rows = slice(top, top + ROWS)
            for left in range(0, top + ROWS, COLUMNS):
                columns = slice(left, min(left + COLUMNS, top + ROWS))
                total[rows, columns] += deltas[rows] @ deltas[columns].T


def _file_ends(trajectory: Trajectory, spec: TensorSpec, unit: Unit, rows: Sequence[int]) -> list[tuple[int, int]]:
    """Return (row, element) where a file ends before that element of a unit."""
    return [
        (row, end)
        for row in rows
        for end in trajectory.checkpoints[row].weights.ends(spec.entries[row])
        if unit.start < end < unit.stop + _FEWEST_ZEROS
    ]


def _is_cut(block: Block, row: int, end: int) -> bool:
    """Whether a row is zero right before `end`, or as far as the block goes, and the base is not."""
    stop = min(end - block.start, len(block.base))
    place = slice(stop - _FEWEST_ZEROS, stop)
    inside = place.start >= 0 and end - block.start - stop < _FEWEST_ZEROS
    return inside and _lost(block.stored[row, place], block.base[place])


def _erased(stored_RN: Tensor, base_N: Tensor) -> list[int]:
    """Return the rows of a chunk in which a whole sector, or its begin or end, is zero and the base's is not."""
    if stored_RN.shape[1] < _FEWEST_ZEROS:
        return []
    sector = min(_SECTOR_BYTES // stored_RN.itemsize, stored_RN.shape[1])
    # One element a sector is looked at first: weights are hardly ever exactly zero.
    suspects = (stored_RN[:, ::sector] == 0).any(dim=1) | (stored_RN[:, -_FEWEST_ZEROS:] == 0).all(dim=1)
    return [row for row in suspects.nonzero().flatten().tolist() if _lost(stored_RN[row], base_N)]


def _lost(stored_N: Tensor, base_N: Tensor) -> bool:
    sector = min(_SECTOR_BYTES // stored_N.itemsize, len(stored_N))
    kept = ((stored_N != 0) | (base_N == 0)).nonzero().flatten()
    gaps = torch.cat([torch.tensor([-1]), kept, torch.tensor([len(stored_N)])]).diff() - 1
    return int(gaps.max()) >= sector or int(gaps[0]) >= _FEWEST_ZEROS or int(gaps[-1]) >= _FEWEST_ZEROS
