"""Per-parameter least squares: a straight line in the training step through every single weight (RELEX at rank K)."""

from dataclasses import dataclass

from torch import Tensor

from relex.predictors.line import line_at


@dataclass(frozen=True)
class RawLinear:
    """No parameters."""

    def coefficients(self, gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> Tensor:
        """Return the fp64 (T, K) least-squares line at the target; the Gram is not looked at."""
        return line_at(steps_K, target_step).expand(gram_TKK.shape[:-1])

    def moves(self, name: str, dimensions: int) -> bool:
        """Every tensor is extrapolated."""
        return True
