"""Means of observed checkpoints: the average of the last m (LAWA-style); with m = 1 hold, the baseline to beat."""

from dataclasses import dataclass

import torch
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.predictor import Predictor, Window


@dataclass(frozen=True)
class Mean(Predictor):
    """The plain average of the `last` checkpoints of the window."""

    last: int = 1

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients; neither the Gram nor the target is looked at."""
        count = len(window.steps_K)
        if not 1 <= self.last <= count:
            raise TargetError(f"last is {self.last}, and the window has {count} checkpoints. Give 1 to {count}.")
        coefficients_K = torch.zeros(count, dtype=torch.float64)
        coefficients_K[-self.last :] = 1.0 / self.last
        return coefficients_K.expand(window.gram_TKK.shape[:-1])
