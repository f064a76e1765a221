"""A curve that levels off through the leading coordinate: a (1 - exp(-s / tau)), zero at the base, fitted per tensor.

With f = 1 - exp(-rate steps) and u the leading eigenvector of the Gram, the best a for a rate is <f, u> / <f, f>, the
best rate the one with the largest <f, u>² / <f, f>, and the prediction sum_k c_k delta_k with
c = u <f, u> / <f, f> f(target). A rate of 0 is the line through the base.
Shape suffixes: T = tensors, K = checkpoints, R = rates that are tried.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relex.predictors.predictor import Predictor, Window

# Rates over 1 / the latest step: below the first a curve is a line, above the last it is level after a few checkpoints.
_RATES = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-6, 1.5, 151, dtype=torch.float64)])
# Halvings between two neighbouring rates: to the last bit.
_HALVINGS = 60


@dataclass(frozen=True)
class Saturating(Predictor):
    """No parameters."""

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficient of each checkpoint's delta; steps increase, with any spacing."""
        last = float(window.steps_K[-1])
        steps_K = window.steps_K / last
        _, vectors_TKK = window.eigen
        u_TK = vectors_TKK[..., -1]
        rate_T = _best_rates(steps_K, u_TK)
        f_TK = _curve(rate_T[..., None], steps_K)
        at_T = _curve(rate_T, torch.tensor(target_step / last, dtype=torch.float64))
        scale_T = (f_TK * u_TK).sum(-1) / f_TK.square().sum(-1) * at_T
        return u_TK * scale_T[..., None]


def _best_rates(steps_K: Tensor, u_TK: Tensor) -> Tensor:
    """Return (T,) the rates at which the curve fits best."""
    f_RK = _curve(_RATES[:, None], steps_K)
    fit_TR = (u_TK @ f_RK.mT).square() / f_RK.square().sum(-1)
    place_T = fit_TR.argmax(-1)
    # Between the neighbours of the best one the fit rises, then falls.
    low_T = _RATES[(place_T - 1).clamp(min=0)]
    high_T = _RATES[(place_T + 1).clamp(max=len(_RATES) - 1)]
    for _ in range(_HALVINGS):
        middle_T = (low_T + high_T) / 2.0
        rising_T = _slope(middle_T, steps_K, u_TK) > 0
        low_T, high_T = torch.where(rising_T, middle_T, low_T), torch.where(rising_T, high_T, middle_T)
    return torch.where(place_T == 0, torch.zeros_like(low_T), (low_T + high_T) / 2.0)


def _slope(rate_T: Tensor, steps_K: Tensor, u_TK: Tensor) -> Tensor:
    """Return (T,) something with the sign of the derivative of <f, u>² / <f, f> by the rate."""
    f_TK = -torch.expm1(-rate_T[..., None] * steps_K)
    by_rate_TK = steps_K * torch.exp(-rate_T[..., None] * steps_K)
    along_T = (f_TK * u_TK).sum(-1)
    turned_T = (by_rate_TK * u_TK).sum(-1) * f_TK.square().sum(-1) - along_T * (f_TK * by_rate_TK).sum(-1)
    return turned_T * along_T.sign()


def _curve(rate: Tensor, steps: Tensor) -> Tensor:
    """Return (1 - exp(-rate steps)) / rate, which is the step itself at rate 0."""
    safe = torch.where(rate > 0, rate, 1.0)
    return torch.where(rate > 0, -torch.expm1(-safe * steps) / safe, steps)
