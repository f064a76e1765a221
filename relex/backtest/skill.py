"""How well rank-1 lines foretell checkpoints that were observed too: jumps from rolling origins, from Grams alone.

With u the leading eigenvector of the window's Gram and U = sum_k u_k delta_k, the line rebuilt from the base is
(mean(u) + (s* - mean(s)) uᵀg) U and the pinned one delta_K + damping (s* - s_K) (uᵀg) U, g the slope weights: all
errors follow from G u and from entries of G. Shape suffixes: T = Grams (tensors, or whole trajectories),
K = checkpoints, W = those of a window, O = origins.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.special import stdtrit
from torch import Tensor

from relex.predictors.line import slope

# Multiples of the origin's step: a jump by 1 doubles the steps.
HORIZONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
DAMPINGS = (0.1, 0.3, 0.6, 1.0)
# The window begins at this share of the origin's step.
STARTS = (0.0, 0.5, 0.75)
# Of 2 checkpoints the line is the chord: it says nothing that its ends do not.
FEWEST = 3
# From one origin to the next, in steps: nearer ones see nearly the same window.
_APART = 1.2
# One-sided.
CONFIDENCE = 0.95


@dataclass(frozen=True, order=True)
class Way:
    """One way to extrapolate: rebuilt from the base or pinned to the latest, with its damping, and where windows begin.

    `start` is a share of the origin's step; 0 begins at the first checkpoint.
    """

    form: Literal["relex", "relex-pinned"]
    damping: float
    start: float

    @property
    def method(self) -> str:
        """The method's spec, as `predictors.parse_method` reads it."""
        return self.form if self.form == "relex" else f"{self.form}:damping={self.damping:g}"


@dataclass(frozen=True)
class Jumps:
    """Jumps of one way by one horizon. `origins` and `targets` are training steps, the tensors are (O, T) fp64.

    `missed` and `held` are the squared distances of the prediction and of the origin to the real checkpoint, `inner`
    the product of the predicted and the real delta, `predicted` and `real` their squared norms.
    """

    origins: tuple[int, ...]
    targets: tuple[int, ...]
    missed: Tensor
    held: Tensor
    inner: Tensor
    predicted: Tensor
    real: Tensor

    def pooled(self) -> "Jumps":
        """Return the jumps of all tensors together (T = 1)."""
        parts = (self.missed, self.held, self.inner, self.predicted, self.real)
        return Jumps(self.origins, self.targets, *(part.sum(1, keepdim=True) for part in parts))

    def skill(self) -> Tensor:
        """Return (O, T) 1 - missed / held: above 0 is nearer than the origin itself."""
        # A run that comes back to the origin exactly leaves nothing to divide by.
        floor_OT = self.real * torch.finfo(torch.float64).eps + torch.finfo(torch.float64).tiny
        return (self.held - self.missed) / torch.maximum(self.held, floor_OT)

    def independent(self) -> int:
        """Return how many of the jumps do not overlap in steps."""
        count, reached = 0, 0
        for origin, target in zip(self.origins, self.targets, strict=True):
            if origin >= reached:
                count, reached = count + 1, target
        return count

    def lower_bound(self) -> Tensor:
        """Return (T,) the one-sided 95 % lower bound of the mean skill over origins; -inf with fewer than 2 jumps.

        Student's, counting only jumps that do not overlap.
        """
        skill_OT = self.skill()
        count = self.independent()
        if count < 2:
            return torch.full_like(skill_OT[0], -torch.inf)
        error_T = skill_OT.std(0) / math.sqrt(count)
        return skill_OT.mean(0) - float(stdtrit(count - 1, CONFIDENCE)) * error_T


def jumps(gram_TKK: Tensor, steps: Sequence[int]) -> dict[tuple[Way, float], Jumps]:
    """Return the jumps by way and horizon that the steps allow; empty with too few of them.

    The target of a jump is the first checkpoint at least the horizon away, and less than twice that.
    """
    rows: dict[tuple[Way, float], list[tuple[int, int, tuple[Tensor, ...]]]] = {}
    for origin in _origins(steps):
        targets = dict(_targets(steps, origin))
        for start in STARTS if targets else ():
            first = next(row for row, step in enumerate(steps) if step >= start * steps[origin])
            if origin - first + 1 < FEWEST:
                continue
            for way, horizon, measured in _measure(gram_TKK, steps, range(first, origin + 1), targets, start):
                rows.setdefault((way, horizon), []).append((steps[origin], steps[targets[horizon]], measured))
    return {
        key: Jumps(
            tuple(origin for origin, _, _ in found),
            tuple(target for _, target, _ in found),
            *(torch.stack(part) for part in zip(*(measured for _, _, measured in found), strict=True)),
        )
        for key, found in sorted(rows.items())
    }


def _origins(steps: Sequence[int]) -> Iterator[int]:
    last = 0.0
    for row in range(FEWEST - 1, len(steps) - 1):
        if steps[row] >= _APART * last:
            last = steps[row]
            yield row


def _targets(steps: Sequence[int], origin: int) -> Iterator[tuple[float, int]]:
    """Yield every horizon that has a target, and its row."""
    for horizon in HORIZONS:
        target = next((row for row, step in enumerate(steps) if step >= (1.0 + horizon) * steps[origin]), None)
        if target is not None and steps[target] < (1.0 + 2.0 * horizon) * steps[origin]:
            yield horizon, target


def _measure(
    gram_TKK: Tensor, steps: Sequence[int], window: range, targets: dict[float, int], start: float
) -> Iterator[tuple[Way, float, tuple[Tensor, ...]]]:
    """Yield missed, held, inner, predicted and real (T,) of every form, damping and horizon from one window."""
    rows, last = slice(window.start, window.stop), window.stop - 1
    steps_W = torch.tensor(steps[rows], dtype=torch.float64)
    values_TW, vectors_TWW = torch.linalg.eigh(gram_TKK[:, rows, rows])
    u_TW, square_T = vectors_TWW[..., -1], values_TW[..., -1].clamp(min=0.0)
    # <U, delta_k> of every checkpoint, the targets among them.
    along_TK = torch.matmul(u_TW[:, None], gram_TKK[:, rows])[:, 0]
    mean_T, slope_T = u_TW.mean(-1), u_TW @ slope(steps_W)
    held_by_T = gram_TKK[:, last, last]
    for horizon, target in targets.items():
        real_T = gram_TKK[:, target, target]
        distance_T = (held_by_T - 2.0 * gram_TKK[:, last, target] + real_T).clamp(min=0.0)
        scale_T = mean_T + (steps[target] - steps_W.mean()) * slope_T
        inner_T, predicted_T = scale_T * along_TK[:, target], scale_T.square() * square_T
        missed_T = (predicted_T - 2.0 * inner_T + real_T).clamp(min=0.0)
        yield Way("relex", 1.0, start), horizon, (missed_T, distance_T, inner_T, predicted_T, real_T)
        for damping in DAMPINGS:
            scale_T = damping * (steps[target] - steps[last]) * slope_T
            inner_T = gram_TKK[:, last, target] + scale_T * along_TK[:, target]
            predicted_T = held_by_T + 2.0 * scale_T * along_TK[:, last] + scale_T.square() * square_T
            missed_T = (predicted_T - 2.0 * inner_T + real_T).clamp(min=0.0)
            yield Way("relex-pinned", damping, start), horizon, (missed_T, distance_T, inner_T, predicted_T, real_T)
