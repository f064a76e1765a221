"""Curves in the training step through the leading singular coordinates of one tensor's trajectory.

The deltas are D = U diag(sigma) Vᵀ, the coordinates C = U diag(sigma). Whatever a temporal model predicts for them at
the target, c_hat, is sum_k c_k delta_k with c = U diag(1 / sigma) c_hat. Polynomial and sinusoid are what the RELEX
paper (arXiv 2605.21468) compares its line with; here the abscissa is the real training step, not the row number.
Shape suffixes: T = tensors, K = checkpoints, R = rank, N = series (tensors x rank).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.polynomial import polynomial, polyutils
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
        sigma_TR = values_TK[..., -self.rank :].clamp(min=0.0).sqrt()
        basis_TKR = vectors_TKK[..., -self.rank :]
        # The sign of an eigenvector is the library's choice, and a sinusoid's fit may depend on it.
        basis_TKR = basis_TKR * torch.where(basis_TKR[..., -1:, :] < 0, -1.0, 1.0)
        series_KN = (basis_TKR * sigma_TR[..., None, :]).movedim(-2, 0).reshape(count, -1).numpy()
        predicted_N = self._predict(window.steps_K.numpy(), series_KN, float(target_step))
        predicted_TR = torch.from_numpy(predicted_N).reshape(sigma_TR.shape)
        scaled_TR = torch.where(sigma_TR > _NULL * sigma_TR[..., -1:], predicted_TR / sigma_TR, 0.0)
        return torch.matmul(basis_TKR, scaled_TR[..., None])[..., 0]

    @property
    def by_tensor(self) -> bool:
        """A product over the coordinates of all tensors has other last bits than one over a few; sinusoids are slow."""
        return False

    @property
    def _described(self) -> str:
        return f"polynomial of degree {self.degree}" if self.curve == "polynomial" else "sinusoid"

    def _predict(self, steps: Array, series_KN: Array, target: float) -> Array:
        """Return (N,) where each series is at the target."""
        points = self.last or len(steps)
        steps, series_KN = steps[-points:], series_KN[-points:]
        gap = float(np.median(np.diff(steps)))
        ahead = self.refit * gap
        while self.refit and target > steps[-1] + ahead:
            new = steps[-1] + gap * np.arange(1, self.refit + 1)
            made_AN = np.stack([self._at(steps, series_KN, step) for step in new])
            steps, series_KN = np.append(steps, new)[-points:], np.concatenate([series_KN, made_AN])[-points:]
        return self._at(steps, series_KN, target)

    def _at(self, steps: Array, series_KN: Array, target: float) -> Array:
        if self.curve == "polynomial":
            return _polynomial_weights(steps, self.degree, target) @ series_KN
        return np.array([_sinusoid_at(steps, values, target) for values in series_KN.T])


def _polynomial_weights(steps: Array, degree: int, target: float) -> Array:
    """Return (K,) w with w @ values = the least-squares polynomial of the values at `target`."""
    # Fitted on steps scaled to -1..1, without which a cubic in steps of thousands is all rounding.
    offset, scale = polyutils.mapparms([steps[0], steps[-1]], [-1.0, 1.0])
    coefficients_DK = polynomial.polyfit(offset + scale * steps, np.eye(len(steps)), degree)
    weights: Array = polynomial.polyval(offset + scale * target, coefficients_DK)
    return weights


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
