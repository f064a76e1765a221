"""Means of observed checkpoints: the average of the last m (LAWA-style); with m = 1 hold, the baseline to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from relex.errors import TargetError


@dataclass(frozen=True)
class Mean:
    """The plain average of the `last` checkpoints of the window."""

    last: int = 1

    def coefficients(self, gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients; neither the Gram nor the target is looked at."""
        if not 1 <= self.last <= len(steps_K):
            raise TargetError(
                f"last is {self.last}, and the window has {len(steps_K)} checkpoints. Give 1 to {len(steps_K)}."
            )
        coefficients_K = torch.zeros(len(steps_K), dtype=torch.float64)
        coefficients_K[-self.last :] = 1.0 / self.last
        return coefficients_K.expand(gram_TKK.shape[:-1])

    def moves(self, name: str, dimensions: int) -> bool:
        """Every tensor is averaged."""
        return True
