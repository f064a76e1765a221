"""The factors of smallest rank that hold the predicted delta of one adapted tensor.

The delta is sum_k c_k s_k L_k R_kᵀ = L D Rᵀ, all checkpoints' factors side by side. With triangles L = Q₁ T₁, R = Q₂ T₂
its singular values are those of the small T₁ D T₂ᵀ = U Σ Vᵀ, and cut to the first of them it is
(L D T₂ᵀ V Σ^-½)(R D T₁ᵀ U Σ^-½)ᵀ: no Q is formed, and nothing is divided by a small number.

Shape suffixes: S = ranks of all checkpoints together, R = rank that is kept, P = positions along one side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from relex.errors import NonFiniteError
from relex.factor_gram import TILE, Side, left_side, right_side, tiles
from relex.forecast import Forecast
from relex.layouts.factors import AdapterWeights, LowRank
from relex.output.combine import needed_rows
from relex.trajectory import TensorSpec, Trajectory

# The largest relative Frobenius error of a tensor's delta.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Truncated:
    """A predicted delta as far as it is kept: how the stacked factors of each side are mixed, (S, R) fp64, to its own.

    `entries` and `weights` are of the checkpoints it is made from (of none: it is zero); `error` is the relative
    Frobenius error.
    """

    entries: tuple[LowRank, ...]
    weights: tuple[AdapterWeights, ...]
    left_SR: Tensor
    right_SR: Tensor
    error: float

    @property
    def rank(self) -> int:
        """The rank that is kept; 1 for a zero delta, since peft knows no rank 0."""
        return self.left_SR.shape[1]


def truncate(trajectory: Trajectory, spec: TensorSpec, forecast: Forecast) -> Truncated:
    """Return the delta of one tensor, truncated to the smallest rank within TOLERANCE; raises NonFiniteError."""
    predicted = forecast.tensors[spec.name]
    rows = needed_rows(predicted, len(spec.entries))
    if not rows:
        return Truncated((), (), torch.zeros(0, 1), torch.zeros(0, 1), 0.0)
    entries = tuple(spec.adapted[row] for row in rows)
    weights = tuple(trajectory.adapters[row] for row in rows)
    scales = [
        entry.scale * (predicted.coefficients[row] if predicted.source == "combined" else 1.0)
        for entry, row in zip(entries, rows, strict=True)
    ]
    ranks = torch.tensor([entry.left.rank for entry in entries])
    scale_S = torch.tensor(scales, dtype=torch.float64).repeat_interleave(ranks)
    left, right = (_triangle(weights, entries, side) for side in (left_side, right_side))
    core = (left * scale_S) @ right.T
    if not bool(torch.isfinite(core).all()):
        raise NonFiniteError(
            f"{spec.name} predicted at step {forecast.target_step} by {forecast.method} is not finite. Give a nearer"
            " target."
        )
    u, sigma, vh = torch.linalg.svd(core, full_matrices=False)
    # What is left out when so many are kept.
    tails = torch.cat([sigma.square().flip(0).cumsum(0).flip(0).sqrt(), torch.zeros(1, dtype=torch.float64)])
    kept = max(1, int((tails > TOLERANCE * tails[0]).sum()))
    root = torch.where(sigma[:kept] > 0, sigma[:kept].rsqrt(), 0.0)
    error = float(tails[kept] / tails[0]) if float(tails[0]) > 0 else 0.0
    left_SR = scale_S[:, None] * (right.T @ vh[:kept].T) * root
    right_SR = scale_S[:, None] * (left.T @ u[:, :kept]) * root
    return Truncated(entries, weights, left_SR, right_SR, error)


def mixed(truncated: Truncated, side: Side, *, length: int) -> Iterator[tuple[int, Tensor]]:
    """Yield one side of it as (first position, (P, R) fp32), tile by tile; `length` is that of the whole side."""
    if not truncated.entries:
        for start in range(0, length, TILE):
            yield start, torch.zeros(min(TILE, length - start), truncated.rank)
        return
    mix_SR = truncated.left_SR if side is left_side else truncated.right_SR
    for number, stacked_SP in enumerate(tiles(truncated.weights, truncated.entries, side)):
        yield number * TILE, (stacked_SP.T @ mix_SR).float()


def memory(spec: TensorSpec) -> int:
    """Return the bytes that `truncate` and `mixed` take for one tensor."""
    ranks = sum(entry.left.rank for entry in spec.adapted)
    return 8 * (6 * ranks**2 + 4 * ranks * TILE)


def _triangle(weights: Sequence[AdapterWeights], entries: Sequence[LowRank], side: Side) -> Tensor:
    """Return T of QT = the factors of one side, side by side; T has S columns and at most S rows."""
    triangle = torch.zeros(0, sum(entry.left.rank for entry in entries), dtype=torch.float64)
    for stacked_SP in tiles(weights, entries, side):
        triangle = torch.linalg.qr(torch.cat([triangle, stacked_SP.T]), mode="r").R
    return triangle
