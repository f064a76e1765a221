"""Prediction intervals of how far the run will be from its base: the norm of the delta at a target step.

The line through all parameters predicts a delta L. Along L the observed deltas are a scalar series, and the error of
its own line there gives the interval; across L only the size of the residuals is known, and they add to the norm. Both
hold as far as the run goes on along a line. Shape suffixes: T = tensors, K = checkpoints, B = draws.
"""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from relex.predictors.line import line_at, slope

# Two-sided coverage of every interval here.
COVERAGE = 0.90
_DRAWS = 999


@dataclass(frozen=True)
class _Series:
    """The deltas seen from the predicted one: its norm, the residuals (K,) along it, and what is across (squared)."""

    norm: float
    residuals_K: Tensor
    line_K: Tensor
    across: float

    def norms(self, errors: Tensor) -> tuple[float, float]:
        """Return the norms for two errors along the predicted delta."""
        low, high = ((self.norm + errors).clamp(min=0.0).square() + self.across).clamp(min=0.0).sqrt().tolist()
        return low, high


def norm_band(gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> tuple[float, float] | None:
    """Return the wider of the two 90 % intervals of the delta's norm; None with fewer than 3 checkpoints."""
    line, drawn = (interval(gram_TKK, steps_K, target_step) for interval in (line_interval, bootstrap_interval))
    return (min(line[0], drawn[0]), max(line[1], drawn[1])) if line is not None and drawn is not None else None


def line_interval(gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> tuple[float, float] | None:
    """Return the 90 % interval of the delta's norm by the standard error of the least-squares line (Student's t).

    Right for residuals without memory. None with fewer than 3 checkpoints, where the line leaves no residual.
    """
    if len(steps_K) < 3:
        return None
    series = _series(gram_TKK, steps_K, target_step)
    freedom = len(steps_K) - 2
    error = (series.residuals_K.square().sum() / freedom * (1.0 + series.line_K.square().sum())).sqrt()
    quantile = float(stdtrit(freedom, (1.0 + COVERAGE) / 2))
    return series.norms(torch.stack([-quantile * error, quantile * error]))


def bootstrap_interval(
    gram_TKK: Tensor, steps_K: Tensor, target_step: float, *, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 90 % interval of the delta's norm by a moving-block bootstrap of the residuals over steps.

    The blocks (K^(1/3) checkpoints) keep what memory the residuals have. None with fewer than 3 checkpoints.
    """
    count = len(steps_K)
    if count < 3:
        return None
    series = _series(gram_TKK, steps_K, target_step)
    residuals_K = series.residuals_K * (count / (count - 2)) ** 0.5
    size = round(count ** (1 / 3))
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(0, count - size + 1, (_DRAWS, -(-(count + 1) // size)), generator=generator)
    drawn = residuals_K[(first[..., None] + torch.arange(size)).flatten(1)]
    errors_B = drawn[:, count] - drawn[:, :count] @ series.line_K
    tail = (1.0 - COVERAGE) / 2
    return series.norms(torch.quantile(errors_B, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)))


def _series(gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> _Series:
    gram_KK = gram_TKK.sum(0)
    line_K = line_at(steps_K, target_step)
    norm = float((line_K @ gram_KK @ line_K).clamp(min=0.0).sqrt())
    hat_KK = 1.0 / len(steps_K) + torch.outer(steps_K - steps_K.mean(), slope(steps_K))
    rest_KK = torch.eye(len(steps_K), dtype=torch.float64) - hat_KK
    along_K = gram_KK @ line_K / norm if norm > 0 else torch.zeros_like(line_K)
    residuals_K = rest_KK @ along_K
    across = (torch.sum(rest_KK * gram_KK) - residuals_K.square().sum()).clamp(min=0.0) / (len(steps_K) - 2)
    # A new checkpoint brings its own residual across; that of the line is in its norm already.
    return _Series(norm, residuals_K, line_K, float(across * (1.0 - line_K.square().sum())))
