"""Bound: what scores on a sample of problems show about the mean over all such problems.

Of two models the paired difference d of their scores on each problem counts, d in -1..1. Which bound on its mean:

- d is the same on every problem: no variance was seen, which is not certainty. With confidence C at most the share
  1 - (1-C)^(1/n) of all problems, about 3/n, differs from what was seen, and the worst d is -1. So equal scores decide
  nothing until n exceeds about 3/margin.
- Scores 0/1: the score bound for paired proportions (Tango, Statistics in Medicine 17, 1998), however many problems are
  discordant (d not 0): the t bound errs up to 8 times in 100 at a margin above 0. With margin 0 and fewer than 25
  discordant problems it is no more than the exact McNemar bound (Clopper-Pearson on the share of wins among them).
- Scores averaged over repeats, fewer than 25 discordant problems: Tango's too, by the sums of what was won and lost. It
  is then the bound for each d rounded at random to -1, 0 or 1 with its mean kept, which varies more.
- Other averaged scores: Student's t corrected for skewness (Hall, JRSS B 54, 1992). Many small gains and rare collapses
  are skewed: plain t errs up to 13 times in 100 there. And no more than if collapses had not been drawn (as where no
  variance was seen): of what never showed, no moment tells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

# scipy is imported below functions: it takes a second, and whoever shows a verdict computes none.
FloatArray: TypeAlias = npt.NDArray[np.float64]

FEW_DISCORDANT = 25
RESAMPLES = 2000
# With which probability `needed` problems show what is so.
POWER = 0.8


@dataclass(frozen=True)
class PairedBounds:
    """What n paired differences show about their mean, in score units.

    `lower_bound` and `upper_bound` are one-sided, each by itself; `interval` is two-sided at the same confidence, never
    narrower on its lower side.
    `needed` is how many problems put a lower bound above -margin with probability POWER if d goes on as it was, None if
    no number does.
    """

    difference: float
    lower_bound: float
    upper_bound: float
    interval: tuple[float, float]
    wins: int
    losses: int
    method: str
    needed: int | None


def paired_bounds(
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    margin: float,
    confidence: float,
    clusters: Sequence[str] | None = None,
) -> PairedBounds:
    """Return the bounds on the mean of ours - theirs; scores are in 0..1, at least two problems, in one order.

    `clusters` names the cluster of each problem, at least two; None: problems are independent.
    """
    from scipy import stats

    difference_N = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    # Scores averaged over repeats carry rounding.
    difference_N[np.abs(difference_N) < 1e-9] = 0.0
    n, mean = len(difference_N), float(difference_N.mean())
    wins, losses = int((difference_N > 0).sum()), int((difference_N < 0).sum())
    binary = {*ours, *theirs} <= {0.0, 1.0}
    if np.ptp(difference_N) < 1e-9:
        lower, method = _unseen_bound, "no variance, rule of three"
    elif binary or wins + losses < FEW_DISCORDANT:
        lower, method = _tango_bound, "Tango score"
    else:
        lower, method = _hall_bound, "Hall's t"
    # The exact bound has the sign of the test, and says little where it is not near 0.
    exact = lower is _tango_bound and binary and margin == 0 and wins + losses < FEW_DISCORDANT
    method = "exact McNemar" if exact else method
    bound, units = lower, n
    if clusters is not None:
        names, cluster_N = np.unique(np.asarray(clusters), return_inverse=True)
        units, method = len(names), f"t over {len(names)} clusters"

        def bound(difference_N: FloatArray, confidence: float) -> float:
            return min(lower(difference_N, confidence), _cluster_bound(difference_N, cluster_N, confidence))

    def one_sided(difference_N: FloatArray, wins: int, losses: int) -> float:
        alone = bound(difference_N, confidence)
        return min(alone, _mcnemar_bound(wins, losses, n=n, confidence=confidence)) if exact else alone

    lower_bound = one_sided(difference_N, wins, losses)
    room = mean + margin
    needed = None
    if room > 0 and lower is _unseen_bound:
        # Of as many problems a cluster as there are.
        needed = math.ceil(n / units * math.ceil(math.log(1 - confidence) / math.log1p(-room / (1 + mean))))
    elif room > 0:
        # At room / (quantile / sqrt(n)) alone half of all draws would pass.
        quantile = float(stats.norm.ppf(confidence))
        powerful = (quantile + float(stats.norm.ppf(POWER))) / quantile
        needed = math.ceil(n * (powerful * (mean - lower_bound) / room) ** 2)
    # One side's error is half of both sides'.
    sided = (1 + confidence) / 2
    return PairedBounds(
        difference=mean,
        lower_bound=lower_bound,
        upper_bound=-one_sided(-difference_N, losses, wins),
        interval=(min(bound(difference_N, sided), lower_bound), -bound(-difference_N, sided)),
        wins=wins,
        losses=losses,
        method=method,
        needed=needed,
    )


def mean_interval(scores: Sequence[float], *, confidence: float = 0.95) -> tuple[float, float]:
    """Return the two-sided interval of a mean score: Wilson for scores 0/1, else BCa bootstrap over problems.

    The bootstrap is seeded. Scores in 0..1 may be 0 or 1 on a share of about 4/n of all problems of which none was
    drawn. Every interval of scores that differ has room for that, so that it is no narrower than that of any n equal
    scores, right or wrong or in between. (nan, nan) for equal scores outside 0..1.
    """
    from scipy import stats

    score_N = np.asarray(scores, dtype=np.float64)
    varies = bool(np.ptp(score_N) >= 1e-9)
    ends: list[float] = []
    if not {*score_N} - {0.0, 1.0}:
        ends += stats.binomtest(int(score_N.sum()), len(score_N)).proportion_ci(confidence, method="wilson")
        if not varies:
            return ends[0], ends[1]
    elif varies:
        ends += stats.bootstrap(
            (score_N,), np.mean, confidence_level=confidence, n_resamples=RESAMPLES, rng=np.random.default_rng(0)
        ).confidence_interval
    if score_N.min() >= 0 and score_N.max() <= 1:
        unseen = _unseen(len(score_N), confidence=(1 + confidence) / 2)
        if varies:
            # Wilson's interval of problems that are all right or all wrong is the wider one where there are many.
            square = float(stats.norm.ppf((1 + confidence) / 2)) ** 2
            unseen = max(unseen, square / (len(score_N) + square))
        least = (1 - unseen) * float(score_N.mean())
        ends += [least, least + unseen]
    return (float(np.nanmin(ends)), float(np.nanmax(ends))) if ends else (math.nan, math.nan)


def interval_name(scores: Sequence[float]) -> str:
    """Return in words which interval `mean_interval` gives of these scores."""
    if not {*scores} - {0.0, 1.0}:
        return "Wilson"
    return "bootstrap over problems" if np.ptp(scores) >= 1e-9 else "equal scores, room for what was not drawn"


def mean_lower_bound(scores: Sequence[float], *, confidence: float) -> float:
    """Return the one-sided lower bound of a mean of scores in 0..1: exact (Clopper-Pearson) for 0/1, else Hall's t.

    Of averaged scores as many problems may be 0 as may be of which none was drawn.
    """
    from scipy import stats

    score_N = np.asarray(scores, dtype=np.float64)
    if not {*score_N} - {0.0, 1.0}:
        test = stats.binomtest(int(score_N.sum()), len(score_N), alternative="greater")
        return float(test.proportion_ci(confidence, method="exact").low)
    least = (1 - _unseen(len(score_N), confidence=confidence)) * float(score_N.mean())
    return max(0.0, least if np.ptp(score_N) < 1e-9 else min(least, _hall_bound(score_N, confidence)))


def _unseen(n: int, *, confidence: float) -> float:
    return float(1 - (1 - confidence) ** (1 / n))


def _unseen_bound(difference_N: FloatArray, confidence: float) -> float:
    unseen = _unseen(len(difference_N), confidence=confidence)
    return float((1 - unseen) * difference_N.mean() - unseen)


def _hall_bound(difference_N: FloatArray, confidence: float) -> float:
    from scipy import stats

    n, mean, deviation = len(difference_N), float(difference_N.mean()), float(difference_N.std(ddof=1))
    quantile = float(stats.t.ppf(confidence, n - 1))
    skewness = float(stats.skew(difference_N))
    if abs(skewness) > 1e-6:
        # Where Hall's cubic of the t statistic, monotone and nearly without skewness, comes to the quantile.
        root = np.cbrt(1 + skewness * (quantile / math.sqrt(n) - skewness / (6 * n)))
        quantile = 3 * math.sqrt(n) / skewness * (float(root) - 1)
    return min(mean - quantile * deviation / math.sqrt(n), _unseen_bound(difference_N, confidence))


def _cluster_bound(difference_N: FloatArray, cluster_N: npt.NDArray[np.intp], confidence: float) -> float:
    from scipy import stats

    mean = float(difference_N.mean())
    size_C, net_C = np.bincount(cluster_N), np.bincount(cluster_N, weights=difference_N)
    clusters, typical = len(size_C), float(size_C.mean())
    pull_C = mean + (net_C - size_C * mean) / typical
    if np.ptp(pull_C) < 1e-9:
        return _unseen_bound(pull_C, confidence)
    bound = mean - float(stats.t.ppf(confidence, clusters - 1) * pull_C.std(ddof=1)) / math.sqrt(clusters)
    differing = int((np.abs(net_C) > 1e-9).sum())
    if differing >= FEW_DISCORDANT:
        return bound
    # Where most clusters differ, the largest difference tells how far they do; where few do, one may differ wholly.
    largest = float(np.abs(net_C).max() if 2 * differing >= clusters else size_C.max())
    return min(bound, _tango_bound(net_C / largest, confidence) * largest / typical)


def _mcnemar_bound(wins: int, losses: int, *, n: int, confidence: float) -> float:
    from scipy import stats

    # Above zero exactly when the one-sided binomial test of wins against losses rejects at 1 - confidence.
    discordant = wins + losses
    share = stats.binomtest(wins, discordant, alternative="greater").proportion_ci(confidence, method="exact").low
    return discordant / n * (2 * float(share) - 1)


def _tango_bound(difference_N: FloatArray, confidence: float) -> float:
    from scipy import optimize, stats

    n = len(difference_N)
    won, lost = float(difference_N.clip(min=0).sum()), float(-difference_N.clip(max=0).sum())
    quantile = float(stats.norm.ppf(confidence))

    def excess(difference: float) -> float:
        # Observed minus assumed net wins, less the deviation allowed; the share of losses is the restricted maximum
        # likelihood estimate given the assumed difference, the larger root of a quadratic.
        linear = (2 * n - won + lost) * difference - won - lost
        constant = -lost * difference * (1 - difference)
        loss_share = (math.sqrt(linear**2 - 8 * n * constant) - linear) / (4 * n)
        variance = max(0.0, 2 * loss_share + difference * (1 - difference)) / n
        return (won - lost) / n - difference - quantile * math.sqrt(variance)

    return float(optimize.brentq(excess, -1, (won - lost) / n))
