"""Successive halving: the candidates are scored on growing subsets of the selection problems, and half go on each time.

A larger subset begins with the smaller one's problems, whose answers are in the journal: each is generated once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flows.state.decision import Model, Score

# So many go to the whole benchmark: what is nearly as good as the best is not told from it on less.
FINALISTS = 4
# On fewer problems the order of candidates is mostly chance.
FEWEST_PROBLEMS = 100


@dataclass(frozen=True)
class Search:
    """The scores of those that came to the whole benchmark, and the last scores of those that did not."""

    finalists: tuple[Score, ...]
    dropped: tuple[Score, ...]


def subsets(candidates: int, problems: int, *, batch: int) -> list[int]:
    """Return the numbers of problems of the rounds; the last one is all of them.

    They double, in whole batches of `batch` problems, so that each answer is kept for the next round.
    """
    rounds = [problems]
    while candidates > FINALISTS:
        candidates = -(-candidates // 2)
        smaller = -(-(rounds[0] // 2) // batch) * batch
        if smaller < FEWEST_PROBLEMS or smaller >= rounds[0]:
            break
        rounds.insert(0, smaller)
    return rounds


def first_subset(problems: int, *, batch: int) -> list[int]:
    """Return the numbers of problems of the rounds when nobody knows how many will come: the first is the fewest."""
    return subsets(1 << 30, problems, batch=batch)


def search(candidates: Sequence[Model], *, sizes: Sequence[int], measure: Callable[[Model, int], Score]) -> Search:
    """Return who wins through rounds of `sizes` problems; `measure(model, n)` scores a model on the first n."""
    return narrow([measure(model, sizes[0]) for model in candidates], sizes=sizes[1:], measure=measure)


def narrow(scores: Sequence[Score], *, sizes: Sequence[int], measure: Callable[[Model, int], Score]) -> Search:
    """Return who wins through the rounds that come after the one that these scores are of."""
    left, dropped = sorted(scores, key=_rank), list[Score]()
    for number, size in enumerate(sizes):
        keep = _kept(len(left), rounds=len(sizes) - number)
        dropped += left[keep:]
        left = sorted((measure(score.model, size) for score in left[:keep]), key=_rank)
    return Search(tuple(left), tuple(dropped))


def _kept(count: int, *, rounds: int) -> int:
    """Return how many go on: half, or fewer where the rounds that are left would not bring them down otherwise."""
    share = min(0.5, (FINALISTS / count) ** (1.0 / rounds)) if count else 0.0
    # A product that is whole but for rounding is no reason for one more.
    return max(FINALISTS, math.ceil(count * share - 1e-9))


def _rank(score: Score) -> tuple[float, int]:
    # Of equals the one that reaches least far.
    return -score.accuracy, score.model.step
