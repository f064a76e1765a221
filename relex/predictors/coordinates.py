"""Curves in the training step through the leading singular coordinates of one tensor's trajectory.

The deltas are D = U diag(sigma) Vᵀ, the coordinates C = U diag(sigma). Whatever a temporal model predicts for them at
the target, c_hat, is sum_k c_k delta_k with c = U diag(1 / sigma) c_hat. Polynomial and sinusoid are what the RELEX
paper (arXiv 2605.21468) compares its line with; here the abscissa is the real training step, not the row number.
Shape suffixes: T = tensors, K = checkpoints, R = rank.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy.optimize import least_squares
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.predictor import Predictor, Window

Array = NDArray[np.float64]

# Below this share of the largest singular value a direction is noise of the arithmetic, and its coordinate is dropped.
_NULL = 1e-6
_EVALUATIONS = 10_000
_PRECISION = 1e-14


@dataclass(frozen=True)
class Coordinates(Predictor):
    """A `curve` through each of the `rank` leading coordinates.

    `last` fits it to the last checkpoints only (0: all of them); the directions come from all. `refit` predicts that
    many checkpoints ahead, takes them for observed, lets the window slide and fits again until the target is reached
    (0: one fit); their spacing is the median one.
    """

    rank: int = 1
    curve: Literal["polynomial", "sinusoid"] = "polynomial"
    degree: int = 3
    last: int = 0
    refit: int = 0

    def __post_init__(self) -> None:
        for name, value, least in (
            ("rank", self.rank, 1),
            ("degree", self.degree, 0),
            ("last", self.last, 0),
            ("refit", self.refit, 0),
        ):
            if value < least:
                raise TargetError(f"{name} is {value}; give at least {least}.")

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficient of each checkpoint's delta; steps increase, with any spacing."""
        count = len(window.steps_K)
        points = self.last or count
        needed = self.degree + 1 if self.curve == "polynomial" else 4
        if not needed <= points <= count or self.rank > count:
            raise TargetError(
                f"a {self._described} on {points} checkpoints at rank {self.rank} needs at least {needed} of them and"
                f" no more than the window's {count}. Widen the window, or choose others."
            )
        values_TK, vectors_TKK = window.eigen
        if values_TK.dim() == 1:
            return self._of_one(values_TK, vectors_TKK, window.steps_K, target_step)
        pairs = zip(values_TK, vectors_TKK, strict=True)
        return torch.stack([self._of_one(*pair, window.steps_K, target_step) for pair in pairs])

    def _of_one(self, values_K: Tensor, vectors_KK: Tensor, steps_K: Tensor, target_step: float) -> Tensor:
        sigma_R = values_K[-self.rank :].clamp(min=0.0).sqrt()
        basis_KR = vectors_KK[:, -self.rank :]
        # The sign of an eigenvector is the library's choice, and a sinusoid's fit may depend on it.
        basis_KR = basis_KR * torch.where(basis_KR[-1] < 0, -1.0, 1.0)
        steps, target = steps_K.numpy(), float(target_step)
        predicted = [
            self._predict(steps, (basis_KR[:, r] * sigma_R[r]).numpy(), target) if sigma_R[r] > 0 else 0.0
            for r in range(self.rank)
        ]
        scaled_R = torch.where(sigma_R > _NULL * sigma_R[-1], torch.tensor(predicted, dtype=torch.float64) / sigma_R, 0)
        return torch.mv(basis_KR, scaled_R)

    @property
    def _described(self) -> str:
        return f"polynomial of degree {self.degree}" if self.curve == "polynomial" else "sinusoid"

    def _predict(self, steps: Array, values: Array, target: float) -> float:
        points = self.last or len(steps)
        steps, values = steps[-points:], values[-points:]
        gap = float(np.median(np.diff(steps)))
        ahead = self.refit * gap
        while self.refit and target > steps[-1] + ahead:
            new = steps[-1] + gap * np.arange(1, self.refit + 1)
            made = np.array([self._at(steps, values, step) for step in new])
            steps, values = np.append(steps, new)[-points:], np.append(values, made)[-points:]
        return self._at(steps, values, target)

    def _at(self, steps: Array, values: Array, target: float) -> float:
        if self.curve == "polynomial":
            # Fitted on steps scaled to -1..1, without which a cubic in steps of thousands is all rounding.
            return float(Polynomial.fit(steps, values, self.degree)(target))
        return _sinusoid_at(steps, values, target)


def _sinusoid_at(steps: Array, values: Array, target: float) -> float:
    """Fit A sin(2 pi f s + phi) + c by least squares from the strongest frequency of the values, and read it."""
    first, length, centre, spread = steps[0], steps[-1] - steps[0], float(values.mean()), float(values.std())
    if spread == 0.0:
        return centre
    # Steps and values are scaled, so that where the fit ends does not depend on their units.
    times, scaled = (steps - first) / length, (values - centre) / spread
    strongest = int(np.abs(np.fft.rfft(scaled))[1:].argmax()) + 1
    frequency = np.fft.rfftfreq(len(times), d=float(np.diff(times).mean()))[strongest]

    def error(parameters: Array) -> Array:
        return _sinusoid(times, parameters) - scaled

    start = [3.0 / np.sqrt(2.0), frequency, 0.0, 0.0]
    fit = least_squares(
        error, start, method="lm", ftol=_PRECISION, xtol=_PRECISION, gtol=_PRECISION, max_nfev=_EVALUATIONS
    )
    return centre + spread * float(_sinusoid(np.array([(target - first) / length]), fit.x)[0])


def _sinusoid(times: Array, parameters: Array) -> Array:
    amplitude, frequency, phase, centre = parameters
    result: Array = amplitude * np.sin(2.0 * np.pi * frequency * times + phase) + centre
    return result
