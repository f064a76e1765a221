"""Weights kept as an adapter: per tensor nothing, a whole replacement, or the two factors of what is added to the base.

What is added is s·L·Rᵀ, with L (m, r) and R (n, r) for a tensor of shape (m, n); with a magnitude (DoRA) every row, or
column, of base + s·L·Rᵀ is scaled to it. It is read as fp32 deltas: base plus delta is rounded once, when it is used.

Shape suffixes: M, N = rows and columns of the tensor, R = rank, C = one cell of the grid, flat.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from relex.layouts.weights import TensorEntry, Weights

# Elements that are multiplied out at once, on a grid of the tensor's own: the bits of a delta then do not depend on how
# much of it is asked for.
CELL = 1 << 15


@dataclass(frozen=True)
class Factor:
    """One side of a delta, (length, rank); `transposed` when it is stored as (rank, length)."""

    stored: TensorEntry
    transposed: bool

    @property
    def length(self) -> int:
        """Rows, or columns, of the tensor."""
        return self.stored.shape[1 if self.transposed else 0]

    @property
    def rank(self) -> int:
        """Columns of this factor."""
        return self.stored.shape[0 if self.transposed else 1]


@dataclass(frozen=True)
class Unchanged(TensorEntry):
    """A tensor that the adapter leaves alone. It has no pieces: there is nothing to read."""


@dataclass(frozen=True)
class LowRank(TensorEntry):
    """A tensor to which scale·left·rightᵀ is added; it has no pieces of its own and its dtype, fp32, is the delta's.

    `magnitude` is the length that each row of the sum is given (each column where the left factor is stored
    transposed), None when it is left as it comes. `embedding` tells a look-up table's adapter from a matrix's.
    """

    left: Factor
    right: Factor
    scale: float
    magnitude: TensorEntry | None
    embedding: bool

    @property
    def parts(self) -> tuple[TensorEntry, ...]:
        """The tensors it is stored in: first the factor that training starts from zero."""
        first, second = (self.right, self.left) if self.left.transposed else (self.left, self.right)
        if self.embedding:
            first, second = second, first
        return tuple(part for part in (first.stored, second.stored, self.magnitude) if part is not None)


@dataclass(frozen=True)
class AdapterWeights(Weights):
    """One adapter on `base`; `settings` is its adapter_config.json, `keys` the names in the file of whole tensors."""

    base: Weights
    settings: Mapping[str, Any]
    keys: Mapping[str, str]
    # The right factor of the tensor that is being read, by its name, and the norms that a magnitude replaces.
    _right: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    _norms: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    @property
    def scratch(self) -> int:
        """Bytes of memory that reading takes beyond the buffer it fills: factors, and one cell multiplied out."""
        return max(
            (
                # Two tensors are under way where one ends and the next begins.
                2 * 4 * entry.right.length * entry.right.rank + 4 * 8 * (CELL + 2 * entry.right.length)
                for entry in self.tensors.values()
                if isinstance(entry, LowRank)
            ),
            default=0,
        )

    def factor(self, factor: Factor, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a factor in fp32, (stop - start, rank)."""
        stored = factor.stored
        size, dtype = stored.dtype.itemsize, stored.dtype
        if not factor.transposed:
            flat = self.elements(stored, start * factor.rank, stop * factor.rank)
            return flat.view(stop - start, factor.rank).float()
        if (start, stop) == (0, factor.length):
            return self.elements(stored, 0, math.prod(stored.shape)).view(stored.shape).float().T
        rows = torch.empty(factor.rank, (stop - start) * size, dtype=torch.uint8)
        for number, row in enumerate(rows):
            self.read_into(stored, (number * factor.length + start) * size, memoryview(row.numpy().data))
        return rows.view(dtype).float().T

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `entry` from byte `start` on; of a LowRank these are the bytes of its delta.

        `start` and the length of the buffer are then multiples of 4.
        """
        if not isinstance(entry, LowRank):
            super().read_into(entry, start, buffer)
            return
        out = torch.frombuffer(buffer, dtype=torch.float32)
        first, last = start // 4, start // 4 + len(out)
        columns = entry.right.length
        top, bottom = first // CELL * CELL // columns, -(-_cell_end(entry, last - 1) // columns)
        left_MR = self.factor(entry.left, top, bottom)
        right_NR = self._right_of(entry)
        for cell in range(first // CELL * CELL, last, CELL):
            end = _cell_end(entry, cell)
            rows = slice(cell // columns, -(-end // columns))
            delta_MN = (left_MR[rows.start - top : rows.stop - top] @ right_NR.T).mul_(entry.scale)
            if entry.magnitude is not None:
                delta_MN = self._stretched(entry, delta_MN, rows)
            offset = rows.start * columns
            begin, stop = max(cell, first), min(end, last)
            out[begin - first : stop - first] = delta_MN.view(-1)[begin - offset : stop - offset]

    def elements(self, entry: TensorEntry, start: int, stop: int) -> Tensor:
        """Return elements `start` to `stop` of a stored tensor, flat, in its dtype."""
        raw = torch.empty((stop - start) * entry.dtype.itemsize, dtype=torch.uint8)
        self.read_into(entry, start * entry.dtype.itemsize, memoryview(raw.numpy().data))
        return raw.view(entry.dtype)

    def _right_of(self, entry: LowRank) -> Tensor:
        kept = self._right.get(entry.name)
        if kept is None:
            kept = self.factor(entry.right, 0, entry.right.length)
            self._right.clear()
            self._right[entry.name] = kept
        return kept

    def _base_rows(self, entry: LowRank, rows: slice) -> Tensor:
        base, columns = self.base.tensors[entry.name], entry.shape[1]
        size = base.dtype.itemsize
        raw = torch.empty((rows.stop - rows.start) * columns * size, dtype=torch.uint8)
        self.base.read_into(base, rows.start * columns * size, memoryview(raw.numpy().data))
        return raw.view(base.dtype).view(-1, columns).double()

    def _stretched(self, entry: LowRank, delta_MN: Tensor, rows: slice) -> Tensor:
        """Return fp64 magnitude/norm·(base + delta) - base."""
        assert entry.magnitude is not None
        base_MN = self._base_rows(entry, rows)
        factor = self.elements(entry.magnitude, 0, math.prod(entry.magnitude.shape)).double() / self._norms_of(entry)
        factor = factor if entry.left.transposed else factor[rows, None]
        return factor * (base_MN + delta_MN.double()) - base_MN

    def _norms_of(self, entry: LowRank) -> Tensor:
        """Return the fp64 norms of the rows, or columns, of base + delta."""
        kept = self._norms.get(entry.name)
        if kept is None:
            height = max(1, CELL // entry.shape[1])
            right_NR = self._right_of(entry)
            squares = torch.zeros(entry.shape[1 if entry.left.transposed else 0], dtype=torch.float64)
            for top in range(0, entry.shape[0], height):
                rows = slice(top, min(top + height, entry.shape[0]))
                delta_MN = (self.factor(entry.left, rows.start, rows.stop) @ right_NR.T).mul_(entry.scale)
                square_MN = (self._base_rows(entry, rows) + delta_MN.double()).square_()
                if entry.left.transposed:
                    squares += square_MN.sum(0)
                else:
                    squares[rows] = square_MN.sum(1)
            kept = self._norms[entry.name] = squares.sqrt_()
        return kept


def _cell_end(entry: LowRank, element: int) -> int:
    return min((element // CELL + 1) * CELL, math.prod(entry.shape))
