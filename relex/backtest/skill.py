"""How well methods foretell checkpoints that were observed too: jumps from rolling origins, from Grams alone.

A method's prediction is sum_k c_k delta_k over the checkpoints of its window, so every error is a quadratic form of the
Gram G: with t the target, |prediction|² = cᵀG c and <prediction, delta_t> = cᵀG e_t. What a method copies from the
latest checkpoint (see Predictor.moves) counts as predicted: it is the norms, whose part is small.
Shape suffixes: T = Grams (tensors, or whole trajectories), K = checkpoints, W = those of a window, O = origins,
N = predictions.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from scipy.special import stdtrit
from torch import Tensor

from relex.errors import TargetError
from relex.predictors import METHODS, Method, parse_method
from relex.predictors.predictor import Window

# Multiples of the origin's step: a jump by 1 doubles the steps.
HORIZONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# What every backtest tries. A run without direction is lucky with one of them at 2.5 %: more of them make trust harder.
ALWAYS = ("relex", *(f"relex-pinned:damping={damping:g}" for damping in (0.1, 0.3, 0.6, 1.0)))
# The window begins at this share of the origin's step.
STARTS = (0.0, 0.5, 0.75)
# Of 2 checkpoints the line is the chord: it says nothing that its ends do not.
FEWEST = 3
# From one origin to the next, in steps: nearer ones see nearly the same window.
_APART = 1.2
# One-sided.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Way:
    """One way to extrapolate: a method, by its spec, and where windows begin.

    `start` is a share of the origin's step; 0 begins at the first checkpoint.
    """

    method: str
    start: float


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

    def lower_bound(self, last: int) -> Tensor:
        """Return (T,) the one-sided 95 % lower bound of the skill of the next jump, from step `last`.

        It is Student's for one more jump like those seen, counting only jumps that do not overlap, and no more than the
        latest skill less its steepest decline so far (by the logarithm of the step), gone on until `last`. -inf with
        fewer than 2 jumps. A run may bend once it was seen, and no bound from inside knows of that.
        """
        skill_OT = self.skill()
        count = self.independent()
        if count < 2:
            return torch.full_like(skill_OT[0], -torch.inf)
        error_T = skill_OT.std(0) * math.sqrt(1.0 + 1.0 / count)
        like_T = skill_OT.mean(0) - float(stdtrit(count - 1, CONFIDENCE)) * error_T
        log_O1 = torch.tensor(self.origins, dtype=torch.float64).log()[:, None]
        decline_T = ((skill_OT[:-1] - skill_OT[-1]) / (log_O1[-1] - log_O1[:-1])).amax(0).clamp(min=0.0)
        return torch.minimum(like_T, skill_OT[-1] - decline_T * (math.log(last) - log_O1[-1]))


def tried(methods: Sequence[str]) -> tuple[str, ...]:
    """Return ALWAYS and what `methods` add to it; raises TargetError for one that has no backtest."""
    specs = {parse_method(spec).predictor: spec for spec in ALWAYS}
    for spec in methods:
        method = parse_method(spec)
        row = METHODS[method.name]
        if row.backtest == "no":
            raise TargetError(
                f"method {method.name} has no backtest: {row.why}. Choose among {', '.join(_testable())}."
            )
        specs.setdefault(method.predictor, method.spec)
    return tuple(specs.values())


def jumps(gram_TKK: Tensor, steps: Sequence[int], methods: Sequence[str] = ALWAYS) -> dict[tuple[Way, float], Jumps]:
    """Return the jumps by way and horizon that the steps allow; empty with too few of them.

    The target of a jump is the first checkpoint at least the horizon away, and less than twice that. A method has no
    jump from a window that its parameters do not fit.
    """
    parsed = {spec: parse_method(spec) for spec in methods}
    rows: dict[tuple[Way, float], list[tuple[int, int, tuple[Tensor, ...]]]] = {}
    for origin in _origins(steps):
        targets = dict(_targets(steps, origin))
        for start in STARTS if targets else ():
            first = next(row for row, step in enumerate(steps) if step >= start * steps[origin])
            if origin - first + 1 < FEWEST:
                continue
            for (spec, horizon), errors in _measure(gram_TKK, steps, range(first, origin + 1), targets, parsed):
                jump = steps[origin], steps[targets[horizon]], errors
                rows.setdefault((Way(spec, start), horizon), []).append(jump)
    place = {spec: number for number, spec in enumerate(parsed)}
    return {
        key: Jumps(
            tuple(origin for origin, _, _ in made),
            tuple(target for _, target, _ in made),
            *(torch.stack(part) for part in zip(*(errors for _, _, errors in made), strict=True)),
        )
        for key, made in sorted(rows.items(), key=lambda row: (place[row[0][0].method], row[0][0].start, row[0][1]))
    }


def _testable() -> list[str]:
    return [name for name, row in METHODS.items() if row.backtest != "no"]


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
    gram_TKK: Tensor, steps: Sequence[int], window: range, targets: Mapping[float, int], methods: Mapping[str, Method]
) -> Iterator[tuple[tuple[str, float], tuple[Tensor, ...]]]:
    """Yield missed, held, inner, predicted and real (T,) by method and horizon, all from one window."""
    rows, last = slice(window.start, window.stop), window.stop - 1
    seen = Window(gram_TKK[:, rows, rows], torch.tensor(steps[rows], dtype=torch.float64))
    made: dict[tuple[str, float], Tensor] = {}
    for spec, method in methods.items():
        for horizon, target in targets.items():
            # A window may be too short for a method, or begin after the step that it starts from.
            with contextlib.suppress(TargetError):
                made[spec, horizon] = method.predictor.coefficients(seen, steps[target])
    if not made:
        return
    c_TNW = torch.stack(list(made.values()), dim=1)
    # <prediction, delta_k> of every checkpoint, the targets among them: the Gram is read once for all predictions.
    along_TNK = torch.matmul(c_TNW, gram_TKK[:, rows])
    predicted_TN = (along_TNK[..., rows] * c_TNW).sum(-1).clamp(min=0.0)
    for number, (spec, horizon) in enumerate(made):
        target = targets[horizon]
        real_T = gram_TKK[:, target, target]
        held_T = (gram_TKK[:, last, last] - 2.0 * gram_TKK[:, last, target] + real_T).clamp(min=0.0)
        inner_T, predicted_T = along_TNK[:, number, target], predicted_TN[:, number]
        missed_T = (predicted_T - 2.0 * inner_T + real_T).clamp(min=0.0)
        yield (spec, horizon), (missed_T, held_T, inner_T, predicted_T, real_T)
