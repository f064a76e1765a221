"""The Gram of one adapted tensor from its factors: <s_i L_i R_iᵀ, s_j L_j R_jᵀ> = s_i s_j sum((L_iᵀL_j) ∘ (R_iᵀR_j)).

Products of r×r instead of m×n. Factors are read in tiles of fixed length and each product is taken in a fixed shape, so
equal input gives equal bits, and an extended Gram equals one made afresh.

Shape suffixes: K = checkpoints, S = ranks of all checkpoints together, P = positions along one side, N = elements.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from relex.contents import Hash, describe_factors
from relex.layouts.factors import AdapterWeights, Factor, LowRank
from relex.layouts.weights import TensorEntry
from relex.streaming import CHUNK, as_bytes
from relex.trajectory import TensorSpec, Trajectory

# Positions of one side that are multiplied at once.
TILE = 1 << 10


Side = Callable[[LowRank], Factor]
"""Gives one of the two factors."""


def left_side(entry: LowRank) -> Factor:
    """Return the factor along the rows."""
    return entry.left


def right_side(entry: LowRank) -> Factor:
    """Return the factor along the columns."""
    return entry.right


def pays(spec: TensorSpec) -> bool:
    """Whether the Gram of a tensor takes fewer multiplications between its factors than between its deltas."""
    if not spec.relative or any(entry.magnitude is not None for entry in spec.adapted):
        return False
    rows, columns = spec.base.shape
    ranks, count = _ranks(spec), len(spec.entries)
    # Those between the factors are in fp64 throughout, and were seen to take half as long again.
    return 3 * (rows + columns) * ranks**2 <= 2 * (2 * ranks + count**2) * rows * columns


def memory(spec: TensorSpec) -> int:
    """Return the bytes that `read_parts` and `products` take for one tensor."""
    if not spec.relative:
        return 0
    parts = 3 * 4 * CHUNK * len(spec.entries)
    return max(parts, (2 * _ranks(spec) ** 2 + 2 * _ranks(spec) * TILE) * 8) if pays(spec) else parts


def products(trajectory: Trajectory, spec: TensorSpec, *, first: int) -> Tensor:
    """Return the lower triangle of the (K, K) fp64 Gram of one tensor, from row `first` on."""
    entries = spec.adapted
    both = [_sides(trajectory.adapters, entries, side, first=first) for side in (left_side, right_side)]
    starts = _starts(entries)
    gram_KK = torch.zeros(len(entries), len(entries), dtype=torch.float64)
    for i in range(first, len(entries)):
        for j in range(i + 1):
            block = (slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1]))
            gram_KK[i, j] = entries[i].scale * entries[j].scale * (both[0][block] * both[1][block]).sum()
    return gram_KK


def tiles(weights: Sequence[AdapterWeights], entries: Sequence[LowRank], side: Side) -> Iterator[Tensor]:
    """Yield the factors of one side, all checkpoints' below each other, (S, P) in fp64, in tiles of P positions."""
    length = side(entries[0]).length
    for start in range(0, length, TILE):
        stop = min(start + TILE, length)
        yield torch.cat(
            [one.factor(side(entry), start, stop).T.double() for one, entry in zip(weights, entries, strict=True)]
        )


def read_parts(
    trajectory: Trajectory, spec: TensorSpec, digests: Sequence[Hash], *, erased: Callable[[Tensor, Tensor], list[int]]
) -> list[int]:
    """Put what every checkpoint stores of one tensor into its digest, and return the rows that lost a part of it.

    A part is lost that is zero where another checkpoint's is not; `erased` gives the rows of a (K, N) tensor that are
    zero in a stretch where an (N,) one is not. The factor that starts at zero may be so until it is trained.
    """
    lost: list[int] = []
    for digest, entry in zip(digests, spec.adapted, strict=True):
        digest.update(describe_factors(entry))
    for number, parts in enumerate(zip(*(entry.parts for entry in spec.adapted), strict=True)):
        alike = len({(part.shape, part.dtype) for part in parts}) == 1
        zero_before: set[int] = set()
        live: set[int] = set()
        for stored in _flat(trajectory, parts):
            for row, digest in enumerate(digests):
                digest.update(as_bytes(stored[row]))
                if bool(stored[row].any()):
                    live.add(row)
            if alike:
                since, before = _zeros(torch.stack(stored), erased)
                lost += since
                zero_before.update(before)
        if number > 0 or not spec.adapted[0].embedding:  # whose rows are zero until their token is seen
            lost += sorted(row for row in zero_before if row in live or number > 0)
    return lost


def _sides(weights: Sequence[AdapterWeights], entries: Sequence[LowRank], side: Side, *, first: int) -> Tensor:
    """Return the lower block triangle of the (S, S) fp64 products of all checkpoints' factors of one side."""
    starts = _starts(entries)
    total_SS = torch.zeros(starts[-1], starts[-1], dtype=torch.float64)
    for stacked_SP in tiles(weights, entries, side):
        for i in range(first, len(entries)):
            rows = slice(starts[i], starts[i + 1])
            total_SS[rows, : rows.stop] += stacked_SP[rows] @ stacked_SP[: rows.stop].T
    return total_SS


def _flat(trajectory: Trajectory, parts: Sequence[TensorEntry]) -> Iterator[list[Tensor]]:
    """Yield one part of all checkpoints, flat as it is stored, CHUNK elements at a time."""
    for start in range(0, max(math.prod(part.shape) for part in parts), CHUNK):
        yield [
            weights.elements(part, start, max(start, min(start + CHUNK, math.prod(part.shape))))
            for weights, part in zip(trajectory.adapters, parts, strict=True)
        ]


def _zeros(stored_KN: Tensor, erased: Callable[[Tensor, Tensor], list[int]]) -> tuple[list[int], list[int]]:
    """Return the rows that are zero where an earlier one is not, and those where only a later one is not."""
    live_KN = (stored_KN != 0).byte()
    until_KN = live_KN.cummax(0).values
    after_KN = live_KN.flip(0).cummax(0).values.flip(0)
    since, before = [], []
    for row in range(len(stored_KN)):
        if row > 0 and erased(stored_KN[row : row + 1], until_KN[row - 1]):
            since.append(row)
        elif row + 1 < len(stored_KN) and erased(stored_KN[row : row + 1], after_KN[row + 1]):
            before.append(row)
    return since, before


def _ranks(spec: TensorSpec) -> int:
    return sum(entry.left.rank for entry in spec.adapted)


def _starts(entries: Sequence[LowRank]) -> list[int]:
    return list(accumulate((entry.left.rank for entry in entries), initial=0))
