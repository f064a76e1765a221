"""A ladder of jumps along a line, climbed by scores, and whether its best rung is shown to be better than staying.

Shape suffixes: N = problems (or whatever is scored one by one), R = rungs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float64]

# The jumps that are tried, in blocks of steps: from half a block, by a factor of about the square root of two.
BLOCKS = (0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
# So many rungs in a row that do not beat the best one end the ladder.
PATIENCE = 2
# A jump is kept when a ladder without any gain would show one as large with at most this probability. Such a mistake
# costs little, and a jump that is missed costs the steps that it saves: a run that was set apart for this choice ended
# six points lower with 0.05.
LEVEL = 0.2
# Random signs that stand for "no gain"; 1 / (FLIPS + 1) is the smallest probability there is.
FLIPS = 2000
# Signs at a time: so many numbers, whatever the number of problems.
_SIGNS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Rung:
    """A jump of so many steps and the mean of its scores; not finite where weights or scores were not."""

    steps: int
    score: float


@dataclass(frozen=True)
class Climb:
    """What staying scored, the rungs in the order in which they were scored, and the jump that is kept, 0 for none.

    `p` is the probability that a ladder without any gain shows one as large, None where there were too few scores to
    tell: then a jump is kept when it scores above staying.
    """

    stay: float
    rungs: tuple[Rung, ...]
    kept: int
    p: float | None


def rungs(every: int) -> list[int]:
    """Return the jumps to try, in steps, of blocks of `every` steps."""
    return sorted({max(1, round(blocks * every)) for blocks in BLOCKS})


def climb(score: Callable[[int], Scores | None], steps: list[int]) -> Climb:
    """Score staying (a jump of 0) and then one jump after the other, and choose.

    `score` returns (N,) scores of the same problems in the same order for every jump, higher is better, or one number;
    None where the jump is no model. Raises ValueError when their number changes.
    """
    stay_N = score(0)
    known_N = np.isfinite(stay_N) if stay_N is not None else np.zeros(0, dtype=bool)
    if stay_N is None or not known_N.any():
        return Climb(float("nan"), (), 0, None)
    best, score_of_best, worse = 0, float(stay_N[known_N].mean()), 0
    tried: list[Rung] = []
    gains: list[Scores] = []
    for jump in steps:
        scores_N = score(jump)
        if scores_N is not None and scores_N.shape != stay_N.shape:
            raise ValueError(
                f"a jump of {jump} steps has {len(scores_N)} scores and staying has {len(stay_N)}:"
                " score the same problems in the same order, or return one number"
            )
        # A problem that only staying could be scored on says that the jump broke something.
        mean = float("nan") if scores_N is None else float(scores_N[known_N].mean())
        tried.append(Rung(jump, mean))
        if scores_N is not None and np.isfinite(mean):
            gains.append(scores_N[known_N] - stay_N[known_N])
        if mean > score_of_best:
            best, score_of_best, worse = jump, mean, 0
        else:
            worse += 1
        if worse == PATIENCE:
            break
    stay = float(stay_N[known_N].mean())
    if not best:
        return Climb(stay, tuple(tried), 0, None)
    # Of fewer scores all signs alike are no proof.
    if 2.0 ** -int(known_N.sum()) > LEVEL:
        return Climb(stay, tuple(tried), best, None)
    p = chance_of_gain(np.stack(gains))
    return Climb(stay, tuple(tried), best if p <= LEVEL else 0, p)


def chance_of_gain(gains_RN: Scores) -> float:
    """Return how probable a gain as large as that of the best of R rungs is when none gains anything.

    The rung of the largest mean is compared with the largest of all rungs under random signs of each problem's gains,
    the same sign for every rung (the step-down's first step of Westfall and Young, 1993): rungs that answer alike cost
    nothing, and many are no better chance than one. Exact up to the number of random signs for gains that are as often
    positive as negative; with right or wrong scores and one rung it is McNemar's test.
    """
    root_R = np.sqrt((gains_RN**2).sum(axis=1))
    # A rung that answers every problem as staying does has no gain under any signs.
    unit_RN = gains_RN / np.where(root_R > 0, root_R, 1.0)[:, None]
    observed = unit_RN[gains_RN.mean(axis=1).argmax()].sum()
    source = np.random.default_rng(0)
    at_once = max(1, _SIGNS_AT_ONCE // gains_RN.shape[1])
    as_large = 0
    for begin in range(0, FLIPS, at_once):
        count = min(at_once, FLIPS - begin)
        signs_FN = source.integers(0, 2, (count, gains_RN.shape[1])) * 2.0 - 1.0
        as_large += int(((signs_FN @ unit_RN.T).max(axis=1) >= observed - 1e-9).sum())
    return (as_large + 1) / (FLIPS + 1)
