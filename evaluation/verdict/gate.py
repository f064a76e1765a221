"""Gate: is a candidate shown to be no worse than a reference, problem by problem, with stated confidence?

The statistic is the paired difference of the scores on each problem. A one-sided lower confidence bound on its mean,
see evaluation.verdict.bounds, is compared with -margin: above it the gate is passed. Margin 0 asks whether the
candidate is better. An upper bound below -margin shows that it is worse; otherwise nothing is shown.

Who compares several times on the same problems, several candidates or several windows of one run, passes one by luck
more often. Of `comparisons` in all, each is made with an error of (1 - confidence) / comparisons (Bonferroni), or with
that of its `look` (see evaluation.verdict.looks).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AliasChoices, Field

from evaluation.errors import ComparisonError
from evaluation.verdict.bounds import POWER, mean_lower_bound, paired_bounds
from evaluation.verdict.looks import Look
from evaluation.verdict.report import Report

# Bounds are given for no smaller one.
_LEAST_ERROR = 1e-6


@dataclass(frozen=True)
class Gate:
    """What the comparison showed; differences and bounds are in score units, candidate minus reference.

    `confidence` is that of all `comparisons` together; bounds and interval are at `confidence_each`, which is that of
    `error` where looks are counted: this is the `look`-th at these problems. `needed` is how many problems pass it four
    times in five if the differences go on as they were; None where it is passed or no number does. `candidate_at_least`
    bounds the candidate's own accuracy at that confidence, None where problems are of `clusters`. What a gate of an
    earlier version did not hold is None.
    """

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
    verdict: Literal["passed", "not shown", "worse"]
    # Decisions of earlier versions hold it as looks.
    comparisons: Annotated[int, Field(validation_alias=AliasChoices("comparisons", "looks"))] = 1
    interval_low: float | None = None
    interval_high: float | None = None
    wins: int | None = None
    losses: int | None = None
    needed: int | None = None
    look: int | None = None
    error: float | None = None
    candidate_at_least: float | None = None
    upper_bound: float | None = None
    clusters: int | None = None

    @property
    def passed(self) -> bool:
        """Return whether the claim is shown."""
        return self.verdict == "passed"

    @property
    def confidence_each(self) -> float:
        """Return the confidence of this comparison, one of `comparisons`."""
        return 1 - (self.error if self.error is not None else (1 - self.confidence) / self.comparisons)

    @property
    def sentence(self) -> str:
        """Return the decision in plain words with every number in it, differences in points (hundredths)."""
        return (
            f"On {self.n} problems of {self.benchmark}, {self.candidate} scores {self.candidate_accuracy:.4f} and "
            f"{self.reference} {self.reference_accuracy:.4f}: the difference is {_points(self.difference)} points, "
            f"with {_percent(self.confidence_each)} confidence at least {_points(self.lower_bound)} ({self.method}"
            f"{self._correction}); {self.outcome}."
        )

    @property
    def outcome(self) -> str:
        """Return the verdict in plain words: what is shown, or why not and whether more problems would help."""
        if self.passed and self.margin == 0:
            return "it is better: passed"
        if self.passed:
            return f"a loss of {100 * self.margin:g} point{'' if self.margin == 0.01 else 's'} is ruled out: passed"
        if self.verdict == "worse" and self.upper_bound is not None:
            at_most = f"with {_percent(self.confidence_each)} confidence the difference is at most"
            beyond = "" if self.margin == 0 else f", beyond the margin {_points(-self.margin)}"
            return f"it is worse: {at_most} {_points(self.upper_bound)} points{beyond}"
        limit = "0" if self.margin == 0 else f"the margin {_points(-self.margin)}"
        if self.interval_low is None or self.interval_high is None:
            return f"not shown: the lower bound is not above {limit}"
        interval = f"the interval {_points(self.interval_low)} to {_points(self.interval_high)} points"
        where = f"includes {limit}" if self.interval_high >= -self.margin else f"lies below {limit}"
        if self.needed is None:
            return f"not shown: {interval} {where}; the difference points the wrong way, more problems would not help"
        more = _two_digits(self.needed - self.n)
        settled = f"about {more:,} more problems would show it with {100 * POWER:g} % probability"
        return f"not shown: {interval} {where}; {settled} if it stays as it is"

    @property
    def _correction(self) -> str:
        if self.look is not None:
            return f", look {self.look} at {self.benchmark}, {_percent(self.confidence)} over all looks"
        if self.comparisons == 1:
            return ""
        return (
            f", {_percent(self.confidence)} over {self.comparisons} comparisons: {_percent(self.confidence_each)} each"
        )


def gate(
    candidate: Report,
    reference: Report,
    *,
    margin: float,
    confidence: float = 0.95,
    comparisons: int = 1,
    look: Look | None = None,
    clusters: Sequence[str] | None = None,
) -> Gate:
    """Return whether `candidate` is shown to be worse than `reference` by less than `margin` (score units; 0: better).

    `clusters` names the cluster of each problem, in their order, where they are not independent. `comparisons` is their
    number on these problems, this one included, of which none may pass by luck. A `look` has an error of its own; one
    without any shows nothing.
    Refuses with ComparisonError what cannot be paired: another benchmark, digest, metric, set of problems or setting;
    fewer than two problems or clusters; scores outside 0..1; a margin outside [0, 1), a confidence outside (0.5, 1), no
    comparison.
    """
    _refuse_unpaired(candidate, reference)
    if not 0 <= margin < 1:
        raise ComparisonError(f"margin is {margin} and must be in [0, 1): it is a difference in score.")
    if not 0.5 < confidence < 1:
        raise ComparisonError(f"confidence is {confidence} and must be between 0.5 and 1, such as 0.95.")
    if comparisons < 1:
        raise ComparisonError(f"comparisons is {comparisons} and must be at least 1: it counts this one.")
    if clusters is not None and len({*clusters}) < 2:
        raise ComparisonError(
            f"all {candidate.n} problems of {candidate.benchmark} are of the cluster {clusters[0]}: a comparison needs"
            " at least 2, take another column."
        )
    error = (1 - confidence) / comparisons if look is None else look.error
    confidence_each = 1 - max(error, _LEAST_ERROR)
    ours = [score for _, score in candidate.scores]
    bounds = paired_bounds(
        ours,
        [score for _, score in reference.scores],
        margin=margin,
        confidence=confidence_each,
        clusters=clusters,
    )
    passed = error > 0 and bounds.lower_bound > -margin
    return Gate(
        candidate=candidate.model,
        reference=reference.model,
        benchmark=candidate.benchmark,
        n=candidate.n,
        candidate_accuracy=candidate.accuracy,
        reference_accuracy=reference.accuracy,
        difference=bounds.difference,
        lower_bound=bounds.lower_bound,
        confidence=confidence,
        margin=margin,
        method=bounds.method,
        verdict="passed" if passed else "worse" if error > 0 and bounds.upper_bound < -margin else "not shown",
        comparisons=comparisons,
        interval_low=bounds.interval[0],
        interval_high=bounds.interval[1],
        wins=bounds.wins,
        losses=bounds.losses,
        needed=None if passed else bounds.needed,
        look=None if look is None else look.number,
        error=None if look is None else look.error,
        candidate_at_least=None if clusters is not None else mean_lower_bound(ours, confidence=confidence_each),
        upper_bound=bounds.upper_bound,
        clusters=None if clusters is None else len({*clusters}),
    )


def _points(score: float) -> str:
    return f"{100 * score:+.2f}"


def _percent(confidence: float) -> str:
    return f"{100 * confidence:.4g} %"


def _two_digits(number: int) -> int:
    # Rounded up: more digits than these are not known.
    unit: int = 10 ** max(0, len(str(number)) - 2)
    return math.ceil(number / unit) * unit


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
