"""Leading singular triplets of differences between checkpoints, matrix by matrix, within a memory budget.

One difference at a time is held as a dense fp64 matrix and decomposed by Lanczos from a seeded vector (scipy's svds):
on one core 0.3 s for 8960 x 1536 with a clear leading direction, seconds without one. A vector is a matrix of one
column.
Shape suffixes: P = differences, M, N = rows and columns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator, svds

from relex.layouts.weights import is_turned
from relex.progress import Progress
from relex.rank_one import RankOne
from relex.streaming import CHUNK, Unit, Workspace, in_order, workspaces
from relex.trajectory import TensorSpec, Trajectory

Array = NDArray[np.float64]

Pair = tuple[int, int | None]
"""A difference: the checkpoint with the first number minus the one with the second (None: the base)."""

# With a side this short a full decomposition is the faster one.
_SMALL = 32


@dataclass(frozen=True)
class Source:
    """What is decomposed: these tensors of a trajectory, within `memory` bytes, by so many threads."""

    trajectory: Trajectory
    names: tuple[str, ...]
    memory: int
    threads: int
    on_progress: Progress | None = None

    @property
    def count(self) -> int:
        """The number of checkpoints."""
        return len(self.trajectory.checkpoints)

    def turned(self, name: str) -> bool:
        """Whether the matrix is stored as (in, out): it is looked at as (out, in) all the same."""
        within = self._specs[name].within
        return within.turned if within is not None else is_turned(name, self.trajectory.base.config)

    def outer(self, name: str, left_M: NDArray[np.float32], right_N: NDArray[np.float32]) -> RankOne:
        """Return the matrix of a left and a right vector as the tensor is stored."""
        return RankOne(right_N, left_M) if self.turned(name) else RankOne(left_M, right_N)

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return (M, N) of every tensor, N = 1 where it has one dimension."""
        return {name: _shape(self._specs[name]) for name in self.names}

    @cached_property
    def _specs(self) -> dict[str, TensorSpec]:
        return {spec.name: spec for spec in self.trajectory.tensors}


@dataclass(frozen=True)
class Triplets:
    """u (P, M), sigma (P,), v (P, N) of P differences, and their Frobenius norms (P,), in fp64.

    The sign of u and v together is the library's choice. Of a difference that is zero all are.
    """

    left_PM: Array
    sigma_P: Array
    right_PN: Array
    norm_P: Array


def triplets(
    source: Source, pairs: Sequence[Pair], *, names: Sequence[str] | None = None, held: int = 0
) -> Iterator[tuple[str, Triplets]]:
    """Yield the leading triplets of all `pairs` for every tensor (or those of `names`), in the source's order.

    `held` is what the caller keeps in memory besides, in bytes. Raises MemoryBudgetError when one matrix does not fit,
    CheckpointChangedError when a file was cut meanwhile.
    """
    chosen = set(source.names if names is None else names)
    specs = [(index, spec) for index, spec in enumerate(source.trajectory.tensors) if spec.name in chosen]
    # The matrix, the vectors that the iteration works with, and the triplets of those that wait for their turn.
    extra = max(
        (8 * (math.prod(_shape(spec)) + (6 * len(pairs) + 30) * sum(_shape(spec))) for _, spec in specs), default=0
    )
    spaces = workspaces(source.trajectory, 2, memory=source.memory, threads=source.threads, extra=extra, held=held)
    pieces = [Unit(index, 0, spec.count) for index, spec in specs]

    def work(space: Workspace, unit: Unit) -> Triplets:
        matrix_MN = np.empty(_shape(source.trajectory.tensors[unit.tensor]))
        leading = []
        for pair in pairs:
            _read(matrix_MN, source.trajectory, space, unit, pair)
            leading.append(_leading(matrix_MN))
        left, sigma, right, norm = zip(*leading, strict=True)
        if source.turned(source.trajectory.tensors[unit.tensor].name):
            left, right = right, left
        return Triplets(np.stack(left), np.array(sigma), np.stack(right), np.array(norm))

    for done, (unit, decomposed) in enumerate(in_order(work, pieces, spaces), start=1):
        yield source.trajectory.tensors[unit.tensor].name, decomposed
        if source.on_progress is not None:
            source.on_progress(done, len(pieces))


def _read(matrix_MN: Array, trajectory: Trajectory, space: Workspace, unit: Unit, pair: Pair) -> None:
    flat = matrix_MN.reshape(-1)
    later, earlier = pair
    for block in space.blocks(trajectory, unit, [later] if earlier is None else [later, earlier]):
        for place, deltas in space.subtract(block):
            target = flat[block.start + place.start : block.start + place.stop]
            target[:] = deltas[0].numpy()
            if earlier is not None:
                target -= deltas[1].numpy()


def _leading(matrix_MN: Array) -> tuple[Array, float, Array, float]:
    """Return u, sigma, v and the Frobenius norm; the matrix is overwritten."""
    rows, columns = matrix_MN.shape
    norm = float(np.linalg.norm(matrix_MN))
    if norm == 0.0:
        return np.zeros(rows), 0.0, np.zeros(columns), norm
    if min(rows, columns) <= _SMALL:
        left, sigma, right = np.linalg.svd(matrix_MN, full_matrices=False)
        return left[:, 0], float(sigma[0]), right[0], norm
    # The iteration works with squares, and its precision ends at a fixed one.
    matrix_MN /= norm
    # Given as products, since svds would otherwise copy the matrix to transpose it.
    operator = LinearOperator(
        matrix_MN.shape,
        matvec=lambda x: matrix_MN @ x,
        rmatvec=lambda x: matrix_MN.T @ x,
        matmat=lambda x: matrix_MN @ x,
        rmatmat=lambda x: matrix_MN.T @ x,
        dtype=matrix_MN.dtype,
    )
    generator = np.random.default_rng(0)
    start = generator.standard_normal(min(rows, columns))
    left, sigma, right = svds(operator, k=1, v0=start, rng=generator)
    return left[:, 0], float(sigma[0]) * norm, right[0], norm


def anchored(source: Source, added: Mapping[str, RankOne], row: int) -> dict[str, RankOne]:
    """Return what is added to the delta of checkpoint number `row`, with its inner product with that delta."""
    index = {spec.name: place for place, spec in enumerate(source.trajectory.tensors)}
    pieces = [Unit(index[name], 0, source.trajectory.tensors[index[name]].count) for name in added]
    spaces = workspaces(source.trajectory, 1, memory=source.memory, threads=source.threads, extra=2 * 8 * CHUNK)

    def work(space: Workspace, unit: Unit) -> float:
        outer, total = added[source.trajectory.tensors[unit.tensor].name], 0.0
        for block in space.blocks(source.trajectory, unit, [row]):
            for place, deltas in space.subtract(block):
                start, stop = block.start + place.start, block.start + place.stop
                total += float(deltas[0].double() @ outer.elements(start, stop, dtype=torch.float64))
        return total

    inner = [total for _, total in in_order(work, pieces, spaces)]
    return {name: replace(outer, inner=value) for (name, outer), value in zip(added.items(), inner, strict=True)}


def _shape(spec: TensorSpec) -> tuple[int, int]:
    shape = spec.base.shape
    return (shape[0], math.prod(shape[1:]))
