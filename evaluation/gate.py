"""Gate: is a candidate shown to be no worse than a reference, problem by problem, with stated confidence?

The statistic is the paired difference d of the scores on each problem. A one-sided lower confidence bound on its mean
is compared with -margin: above it the gate is passed, otherwise nothing is shown. Margin 0 asks whether the candidate
is better. Which bound:

- d is the same on every problem: no variance was seen, which is not certainty. With confidence C at most the share
  1 - (1-C)^(1/n) of all problems, about 3/n, differs from what was seen, and the worst d is -1. So equal scores decide
  nothing until n exceeds about 3/margin.
- Scores 0/1 and fewer than 25 discordant problems: the t bound is too optimistic. With margin 0 the exact McNemar test
  (Clopper-Pearson on the share of wins among the discordant), otherwise the score bound for paired proportions
  (Tango, Statistics in Medicine 17, 1998).
- Otherwise the paired t bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import optimize, stats

from evaluation.errors import ComparisonError
from evaluation.report import Report

FEW_DISCORDANT = 25


@dataclass(frozen=True)
class Gate:
    """What the comparison showed; differences and bounds are in score units, candidate minus reference."""

    candidate: str
    reference: str
    benchmark: str
    n: int
    candidate_accuracy: float
    reference_accuracy: float
    difference: float
    lower_bound: float
    confidence: float
    margin: float
    method: str
    verdict: Literal["passed", "not shown"]

    @property
    def passed(self) -> bool:
        """Return whether the claim is shown."""
        return self.verdict == "passed"

    @property
    def sentence(self) -> str:
        """Return the decision in plain words with every number in it."""
        if self.margin == 0:
            outcome = "it is better: passed" if self.passed else "that it is better is not shown"
        else:
            loss = f"a loss of {self.margin:g} or more"
            outcome = f"{loss} is ruled out: passed" if self.passed else f"{loss} is not ruled out: not shown"
        return (
            f"On {self.n} problems of {self.benchmark}, {self.candidate} scores {self.candidate_accuracy:.4f} and "
            f"{self.reference} {self.reference_accuracy:.4f}: the difference is {self.difference:+.4f}, with "
            f"{self.confidence:.4g} confidence at least {self.lower_bound:+.4f} ({self.method}); {outcome}."
        )


def gate(candidate: Report, reference: Report, *, margin: float, confidence: float = 0.95) -> Gate:
    """Return whether `candidate` is shown to be worse than `reference` by less than `margin` (score units; 0: better).

    Refuses with ComparisonError what cannot be paired: another benchmark, digest, metric, set of problems or setting;
    fewer than two problems; scores outside 0..1; a margin outside [0, 1) or a confidence outside (0.5, 1).
    """
    _refuse_unpaired(candidate, reference)
    if not 0 <= margin < 1:
        raise ComparisonError(f"margin is {margin} and must be in [0, 1): it is a difference in score.")
    if not 0.5 < confidence < 1:
        raise ComparisonError(f"confidence is {confidence} and must be between 0.5 and 1, such as 0.95.")
    ours = [score for _, score in candidate.scores]
    theirs = [score for _, score in reference.scores]
    lower_bound, method = _lower_bound(ours, theirs, margin=margin, confidence=confidence)
    return Gate(
        candidate=candidate.model,
        reference=reference.model,
        benchmark=candidate.benchmark,
        n=candidate.n,
        candidate_accuracy=candidate.accuracy,
        reference_accuracy=reference.accuracy,
        difference=math.fsum(a - b for a, b in zip(ours, theirs, strict=True)) / candidate.n,
        lower_bound=lower_bound,
        confidence=confidence,
        margin=margin,
        method=method,
        verdict="passed" if lower_bound > -margin else "not shown",
    )


def _refuse_unpaired(candidate: Report, reference: Report) -> None:
    for name in ("benchmark", "benchmark_digest", "metric"):
        ours, theirs = getattr(candidate, name), getattr(reference, name)
        if ours != theirs:
            raise ComparisonError(
                f"{name} is {ours} for {candidate.model} and {theirs} for {reference.model}: score both on one."
            )
    for name in sorted({*candidate.settings, *reference.settings}):
        ours, theirs = candidate.settings.get(name), reference.settings.get(name)
        if ours != theirs:
            raise ComparisonError(
                f"setting {name} is {ours} for {candidate.model} and {theirs} for {reference.model}: "
                "score both with the same settings."
            )
    if [problem for problem, _ in candidate.scores] != [problem for problem, _ in reference.scores]:
        raise ComparisonError(
            f"{candidate.model} has {candidate.n} problems of {candidate.benchmark} and {reference.model} "
            f"{reference.n}, not the same ones in the same order: score both again."
        )
    if candidate.n < 2:
        raise ComparisonError(f"{candidate.benchmark} has {candidate.n} problem: a comparison needs at least 2.")
    for report in (candidate, reference):
        low, high = min(score for _, score in report.scores), max(score for _, score in report.scores)
        if not 0 <= low <= high <= 1:
            raise ComparisonError(
                f"{report.model} has scores of {report.metric} from {low} to {high} and they must be in 0..1: "
                "choose another metric."
            )


def _lower_bound(
    ours: Sequence[float], theirs: Sequence[float], *, margin: float, confidence: float
) -> tuple[float, str]:
    difference_N = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    n = len(difference_N)
    mean = float(difference_N.mean())
    # Not zero: scores averaged over repeats carry rounding.
    if np.ptp(difference_N) < 1e-9:
        unseen = 1 - (1 - confidence) ** (1 / n)
        return (1 - unseen) * mean - unseen, "no variance, rule of three"
    wins, losses = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    if {*ours, *theirs} <= {0.0, 1.0} and wins + losses < FEW_DISCORDANT:
        if margin == 0:
            return _mcnemar_bound(wins, losses, n=n, confidence=confidence), "exact McNemar"
        return _tango_bound(wins, losses, n=n, confidence=confidence), "Tango score"
    error = float(difference_N.std(ddof=1)) / math.sqrt(n)
    return mean - float(stats.t.ppf(confidence, n - 1)) * error, "paired t"


def _mcnemar_bound(wins: int, losses: int, *, n: int, confidence: float) -> float:
    # Above zero exactly when the one-sided binomial test of wins against losses rejects at 1 - confidence.
    discordant = wins + losses
    share = stats.binomtest(wins, discordant, alternative="greater").proportion_ci(confidence, method="exact").low
    return discordant / n * (2 * float(share) - 1)


def _tango_bound(wins: int, losses: int, *, n: int, confidence: float) -> float:
    quantile = float(stats.norm.ppf(confidence))

    def excess(difference: float) -> float:
        # Observed minus assumed count of net wins, less the deviation allowed; the share of losses is the restricted
        # maximum likelihood estimate given the assumed difference, the larger root of a quadratic.
        linear = (2 * n - wins + losses) * difference - wins - losses
        constant = -losses * difference * (1 - difference)
        loss_share = (math.sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)
        variance = max(0.0, 2 * loss_share + difference * (1 - difference)) / n
        return (wins - losses) / n - difference - quantile * math.sqrt(variance)

    return float(optimize.brentq(excess, -1, (wins - losses) / n))
