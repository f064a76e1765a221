"""The methods as their papers state them: the whole matrix of deltas in fp64, an SVD, a fit. Slow and obvious.

D is (K, d): row k is theta_k - theta_0 of one tensor, flattened. Each function returns the delta (d,) predicted at the
target step. numpy and safetensors' own reader only: nothing here is shared with what it is compared to.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]


def wide(tensor: Tensor) -> Array:
    """Return the flat fp64 copy of one tensor."""
    flat: Array = tensor.to(torch.float64).flatten().numpy()
    return flat


def deltas(base: Tensor, checkpoints: Sequence[Tensor]) -> Array:
    """Return D. A base kept finer than the checkpoints is first rounded to what they could have stored of it."""
    stored = checkpoints[0].dtype
    if torch.finfo(stored).eps > torch.finfo(base.dtype).eps:
        base = base.to(stored)
    return np.stack([wide(checkpoint) - wide(base) for checkpoint in checkpoints])


def fit(values: Array, steps: Sequence[int]) -> tuple[Array, Array]:
    """Return intercept and slope of the least-squares line in the step through every column of `values` (K, n)."""
    design = np.stack([np.ones(len(steps)), np.array(steps, dtype=np.float64)], axis=1)
    solution, *_ = np.linalg.lstsq(design, values, rcond=None)
    return solution[0], solution[1]


def coordinates(D: Array, rank: int) -> tuple[Array, Array]:
    """Return the leading singular coordinates (K, r) and directions (r, d) of the trajectory."""
    left, sigma, right = np.linalg.svd(D, full_matrices=False)
    return left[:, :rank] * sigma[:rank], right[:rank]


def relex(D: Array, steps: Sequence[int], target: int, *, rank: int = 1) -> Array:
    """RELEX: a line through each leading coordinate, read at the target."""
    values, directions = coordinates(D, rank)
    intercept, slope = fit(values, steps)
    return (intercept + slope * target) @ directions


def pinned(D: Array, steps: Sequence[int], target: int, *, rank: int = 1, damping: float = 1.0) -> Array:
    """The latest delta, plus the damped slope of the leading coordinates over the distance to the target."""
    values, directions = coordinates(D, rank)
    _, slope = fit(values, steps)
    delta: Array = D[-1] + damping * (target - steps[-1]) * (slope @ directions)
    return delta


def raw(D: Array, steps: Sequence[int], target: int) -> Array:
    """A least-squares line through every parameter."""
    intercept, slope = fit(D, steps)
    return intercept + slope * target


def polynomial(D: Array, steps: Sequence[int], target: int, *, degree: int, rank: int = 1, last: int = 0) -> Array:
    """A polynomial through each leading coordinate of the last checkpoints, read at the target."""
    values, directions = coordinates(D, rank)
    fits = [np.polyfit(np.array(steps[-last:], dtype=np.float64), row[-last:], degree) for row in values.T]
    predicted: Array = np.array([np.polyval(fit, target) for fit in fits]) @ directions
    return predicted


def secant(D: Array, steps: Sequence[int], target: int, *, start: int = 0) -> Array:
    """Weight Extrapolation: the line through the checkpoint at `start` (0: the base) and the latest."""
    first = D[list(steps).index(start)] if start else np.zeros_like(D[0])
    delta: Array = first + (target - start) / (steps[-1] - start) * (D[-1] - first)
    return delta


def late_secant(D: Array, steps: Sequence[int], target: float, *, share: float = 0.5) -> Array:
    """The line through the latest checkpoint and the one nearest a share of its step; the base is one of them."""
    points = np.vstack([np.zeros_like(D[:1]), D[:-1]])
    at = [0, *steps[:-1]]
    nearest = int(np.argmin([abs(step - share * steps[-1]) for step in at]))
    slope: Array = (D[-1] - points[nearest]) / (steps[-1] - at[nearest])
    delta: Array = D[-1] + (target - steps[-1]) * slope
    return delta


def travel(D: Array, steps: Sequence[int], target: int, *, lr: float, share: float = 0.5) -> Array:
    """The same line, the jump damped to T (1 - exp(-jump / T)) with T = 1.5e-3 / lr."""
    length = 1.5e-3 / lr
    jump = length * (1.0 - np.exp(-(target - steps[-1]) / length))
    return late_secant(D, steps, steps[-1] + jump, share=share)


def saturating(D: Array, steps: Sequence[int], target: int) -> Array:
    """A curve a (1 - exp(-s / tau)) through the leading coordinate, by trying every tau on an ever finer grid."""
    values, directions = coordinates(D, 1)
    at = np.array(steps, dtype=np.float64)

    def solve(tau: float) -> tuple[float, float]:
        curve = -np.expm1(-at / tau)
        amplitude = float(curve @ values[:, 0] / (curve @ curve))
        return float(((values[:, 0] - amplitude * curve) ** 2).sum()), amplitude

    low, high = np.log(at[-1] / 30.0), np.log(at[-1] * 1e7)
    for _ in range(8):
        grid = np.linspace(low, high, 201)
        best = int(np.argmin([solve(float(np.exp(value)))[0] for value in grid]))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, 200)]
    tau = float(np.exp((low + high) / 2.0))
    predicted: Array = solve(tau)[1] * -np.expm1(-target / tau) * directions[0]
    return predicted


def expo(D: Array, alpha: float) -> Array:
    """ExPO: the latest weights plus alpha times what they gained on the base."""
    delta: Array = D[-1] + alpha * D[-1]
    return delta


def first_update(D: Array, alpha: float) -> Array:
    """The first delta, alpha times."""
    delta: Array = alpha * D[0]
    return delta


def mean(D: Array, last: int) -> Array:
    """The average of the last checkpoints."""
    average: Array = D[-last:].mean(axis=0)
    return average


def energy(D: Array, rank: int) -> float:
    """Return the share of the squared deltas in the leading singular values."""
    squared = np.linalg.svd(D, compute_uv=False) ** 2
    return float(squared[:rank].sum() / squared.sum())


def r_squared(D: Array, steps: Sequence[int]) -> float:
    """Return R² of the line through the leading coordinate."""
    values, _ = coordinates(D, 1)
    intercept, slope = fit(values, steps)
    residual = values - (intercept + np.outer(steps, slope))
    return float(1.0 - (residual**2).sum() / ((values - values.mean()) ** 2).sum())
