"""Low-rank linear extrapolation (RELEX at rank 1, arXiv 2605.21468).

Fits a straight line in the training step to each leading singular coordinate of the deltas and reads it at the target.
Multiplied out, delta(target) = sum_k c_k delta_k with c = U Uᵀ h: U the top eigenvectors of the Gram matrix, h the
least-squares line at the target. Pinned to the latest checkpoint, only the slope is projected and damped:
c = e_K + damping (target - s_K) U Uᵀ g. Shape suffixes: T = tensors, K = checkpoints, R = rank.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.line import line_at, slope
from relex.predictors.predictor import Predictor, Window


@dataclass(frozen=True)
class LowRankLinear(Predictor):
    """`anchor` says what the extrapolated part is added to: the base (as published) or the latest checkpoint."""

    rank: int = 1
    anchor: Literal["base", "latest"] = "base"
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TargetError(f"rank is {self.rank}; give at least 1.")
        if self.anchor == "base" and self.damping != 1.0:
            raise TargetError(
                f"damping {self.damping} needs anchor=latest: rebuilt from the base there is no jump to damp."
            )

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficient of each checkpoint's delta; steps increase, with any spacing."""
        steps_K = window.steps_K
        if self.rank > len(steps_K):
            raise TargetError(
                f"rank {self.rank} needs as many checkpoints, and the window has {len(steps_K)}. Give a lower rank."
            )
        # A tensor that never moved has a zero Gram and any eigenvectors: harmless, the deltas they combine are zero.
        _, vectors_TKK = window.eigen
        basis_TKR = vectors_TKK[..., -self.rank :]
        if self.anchor == "base":
            return torch.matmul(basis_TKR, torch.matmul(basis_TKR.mT, line_at(steps_K, target_step)[:, None]))[..., 0]
        jump = self.damping * (target_step - steps_K[-1])
        coefficients_TK = jump * torch.matmul(basis_TKR, torch.matmul(basis_TKR.mT, slope(steps_K)[:, None]))[..., 0]
        coefficients_TK[..., -1] += 1.0
        return coefficients_TK
