"""The line through two checkpoints: Weight Extrapolation (arXiv 2601.04537), ExPO (2404.16792), first update; and the
line through the later part of the window, which Adam's first, noisy steps do not turn.

theta = theta_a + beta (theta_b - theta_a), with beta from the target step or given. Step 0 is the base.
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.predictor import Predictor, Window

_NORM = re.compile(r"norm|^ln(_|\d|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Secant(Predictor):
    """From `start` (a training step; 0 is the base) to the latest or the first checkpoint; `beta` None: to the target.

    `norms` says what becomes of normalisation tensors: extrapolated, or copied from the latest checkpoint.
    """

    start: int = 0
    end: Literal["latest", "first"] = "latest"
    beta: float | None = None
    norms: Literal["move", "copy"] = "move"

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients, zero but for the two checkpoints; the Gram is not looked at."""
        steps = [int(step) for step in window.steps_K]
        last = steps[-1] if self.end == "latest" else steps[0]
        if self.start != 0 and self.start not in steps:
            raise TargetError(
                f"start {self.start} is not in the window, which has steps {steps}. Give one of them, or 0 for the"
                " base."
            )
        if self.start >= last:
            raise TargetError(
                f"start {self.start} is not before the {self.end} step {last}. Give an earlier one, or 0 for the base."
            )
        beta = self.beta if self.beta is not None else (target_step - self.start) / (last - self.start)
        coefficients_K = torch.zeros(len(steps), dtype=torch.float64)
        coefficients_K[steps.index(last)] = beta
        if self.start != 0:
            coefficients_K[steps.index(self.start)] += 1.0 - beta
        return coefficients_K.expand(window.gram_TKK.shape[:-1])

    def moves(self, name: str, dimensions: int) -> bool:
        """Weight Extrapolation copies normalisation tensors (1-D, by name) from the latest checkpoint."""
        is_norm = dimensions <= 1 and any(_NORM.search(part) for part in name.split("."))
        return self.norms == "move" or not is_norm


@dataclass(frozen=True)
class LateSecant(Predictor):
    """From the checkpoint nearest `share` of the latest step (0: the base) through the latest checkpoint."""

    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.share < 1.0:
            raise TargetError(f"share is {self.share:g}; give at least 0 and less than 1.")

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients, zero but for the two checkpoints; the Gram is not looked at."""
        return along(window, self.share, target_step - float(window.steps_K[-1]))


def along(window: Window, share: float, jump: float) -> Tensor:
    """Return the (T, K) coefficients `jump` steps beyond the latest checkpoint on the line from the late start.

    The start is the checkpoint, or the base, nearest `share` of the latest step; of two the later one.
    """
    last = float(window.steps_K[-1])
    # The base is at step 0 and its delta is zero: it has no coefficient.
    steps = [0.0, *window.steps_K[:-1].tolist()]
    start = min(reversed(range(len(steps))), key=lambda row: abs(steps[row] - share * last))
    stretch = jump / (last - steps[start])
    coefficients_K = torch.zeros(len(window.steps_K), dtype=torch.float64)
    coefficients_K[-1] = 1.0 + stretch
    if start > 0:
        coefficients_K[start - 1] = -stretch
    return coefficients_K.expand(window.gram_TKK.shape[:-1])
