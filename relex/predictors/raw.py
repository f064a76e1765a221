"""Per-parameter least squares: a straight line in the training step through every single weight (RELEX at rank K)."""

from dataclasses import dataclass

from torch import Tensor

from relex.predictors.line import line_at
from relex.predictors.predictor import Predictor, Window


@dataclass(frozen=True)
class RawLinear(Predictor):
    """No parameters."""

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) least-squares line at the target; the Gram is not looked at."""
        return line_at(window.steps_K, target_step).expand(window.gram_TKK.shape[:-1])
