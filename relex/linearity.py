"""How straight single weights move: R² of a sample of them on the training step (arXiv 2601.04537).

Of every tensor 0.1 % of the entries, at least 50, are drawn; those that hardly move, or take few values, tell nothing
and are dropped. Shape suffixes: K = checkpoints, N = entries.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relex.progress import Progress
from relex.streaming import UNIT, Unit, Workspace, in_order, units, workspaces
from relex.trajectory import Trajectory

SHARE, LEAST = 1e-3, 50
RANGE, DISTINCT = 1e-4, 4


@dataclass(frozen=True)
class Sample:
    """Of one tensor: how many entries were drawn, and R² (fp64, in 0..1) of each that moves enough."""

    drawn: int
    r_squared: NDArray[np.float64]


def weight_r_squared(
    trajectory: Trajectory, *, seed: int, memory: int, threads: int, on_progress: Progress | None = None
) -> dict[str, Sample]:
    """Read the trajectory once, within `memory` bytes, and return a sample of every tensor that may move, by name.

    Equal seeds draw equal entries, whatever the memory and the threads. Raises MemoryBudgetError and
    CheckpointChangedError.
    """
    count = len(trajectory.checkpoints)
    steps_K = torch.tensor(trajectory.steps, dtype=torch.float64)
    drawn: Mapping[int, NDArray[np.int64]] = {
        index: _draw(spec.count, seed=(seed, index))
        for index, spec in enumerate(trajectory.tensors)
        if spec.moves and not spec.unchanged
    }
    # A unit's drawn entries of all checkpoints, a few times over.
    extra = 4 * 8 * (count + 1) * max(LEAST, math.ceil(2 * SHARE * UNIT))
    spaces = workspaces(trajectory, count, memory=memory, threads=threads, extra=extra)

    def work(space: Workspace, unit: Unit) -> NDArray[np.float64]:
        # Once a unit: the last bit of a sum may depend on how many columns there are, and blocks follow the memory.
        return r_squared(torch.cat(list(values(space, unit)), dim=1), steps_K).numpy()

    def values(space: Workspace, unit: Unit) -> Iterator[Tensor]:
        chosen = drawn[unit.tensor]
        for block in space.blocks(trajectory, unit, range(count)):
            first, last = np.searchsorted(chosen, [block.start, block.start + len(block.base)])
            places = torch.from_numpy(chosen[first:last] - block.start)
            # Of an adapter it is what is added to the base: R² and range are the same.
            yield block.stored[:, places].double()

    sampled: dict[int, list[NDArray[np.float64]]] = {index: [] for index in drawn}
    pieces = [unit for unit in units(trajectory) if unit.tensor in drawn]
    for done, (unit, part) in enumerate(in_order(work, pieces, spaces), start=1):
        sampled[unit.tensor].append(part)
        if on_progress is not None:
            on_progress(done, len(pieces))
    trajectory.check_unchanged()
    return {
        trajectory.tensors[index].name: Sample(len(drawn[index]), np.concatenate(parts))
        for index, parts in sampled.items()
    }


def r_squared(values_KN: Tensor, steps_K: Tensor) -> Tensor:
    """Return R² of each column on the step, fp64; columns of a range up to RANGE, or of few values, are left out."""
    spread_N = values_KN.amax(0) - values_KN.amin(0)
    distinct_N = (values_KN.sort(dim=0).values.diff(dim=0) != 0).sum(0) + 1
    values_KN = values_KN[:, (spread_N > RANGE) & (distinct_N >= DISTINCT)]
    return squared_correlation(values_KN, steps_K)


def squared_correlation(values_KN: Tensor, steps_K: Tensor) -> Tensor:
    """Return R² of the line in the step through each column, fp64 (N,); nan where a column is constant."""
    centred_KN = values_KN - values_KN.mean(0)
    steps_K = steps_K - steps_K.mean()
    return (steps_K @ centred_KN).square() / (steps_K.square().sum() * centred_KN.square().sum(0))


def _draw(count: int, *, seed: tuple[int, int]) -> NDArray[np.int64]:
    size = min(count, max(LEAST, math.ceil(SHARE * count)))
    # Of a large tensor this draws by hashing: no permutation of all its entries is laid out.
    chosen = np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False)
    return np.sort(chosen).astype(np.int64)
