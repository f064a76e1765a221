"""Reconstruction of an observed checkpoint within the leading singular directions: what rank r alone costs.

No fit and no extrapolation: delta_k projected onto the directions is sum_l c_l delta_l with c = U Uᵀ e_k, U the top
eigenvectors of the Gram matrix (the first sanity check of the RELEX paper, arXiv 2605.21468; the second is the fit read
at an observed step). Shape suffixes: T = tensors, K = checkpoints, R = rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.predictor import Predictor, Window


@dataclass(frozen=True)
class Reconstruct(Predictor):
    """The observed checkpoint at the target step, as far as `rank` directions hold it."""

    rank: int = 1

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise TargetError(f"rank is {self.rank}; give at least 1.")

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficient of each checkpoint's delta; the target is one of the steps."""
        steps_K = window.steps_K
        if self.rank > len(steps_K):
            raise TargetError(
                f"rank {self.rank} needs as many checkpoints, and the window has {len(steps_K)}. Give a lower rank."
            )
        place = (steps_K == target_step).nonzero().flatten()
        if len(place) == 0:
            raise TargetError(
                f"reconstruct projects an observed step, and {target_step:g} is none of the window's {len(steps_K)},"
                f" {steps_K[0]:g} to {steps_K[-1]:g}. Give one of them, or a method that extrapolates."
            )
        _, vectors_TKK = window.eigen
        basis_TKR = vectors_TKK[..., -self.rank :]
        return torch.matmul(basis_TKR, basis_TKR[..., int(place), :, None])[..., 0]
