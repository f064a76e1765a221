"""Successive halving: the candidates are scored on growing subsets of the selection problems, and half go on each time.

A larger subset begins with the smaller one's problems, whose answers are in the journal: each is generated once.
"""

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


def search(candidates: Sequence[Model], *, problems: int, batch: int, measure: Callable[[Model, int], Score]) -> Search:
    """Return who wins through; `measure(model, n)` scores a model on the first n problems."""
    sizes = subsets(len(candidates), problems, batch=batch)
    left, dropped = list(candidates), list[Score]()
    scores: list[Score] = []
    for number, size in enumerate(sizes, start=1):
        scores = sorted((measure(model, size) for model in left), key=_rank)
        if number < len(sizes):
            keep = max(FINALISTS, -(-len(left) // 2))
            dropped += scores[keep:]
            left = [score.model for score in scores[:keep]]
    return Search(tuple(scores), tuple(dropped))


def choose(selection: Sequence[Score], *, margin: float) -> tuple[Score | None, str]:
    """Return the candidate that goes to the gate, and why or why none does.

    The best on the selection benchmark, if its score there is above the last observed checkpoint's less the margin; of
    equals the one that reaches least far.
    """
    observed = next(score for score in selection if score.model.role == "observed")
    candidates = [score for score in selection if score.model.role == "candidate"]
    best = max(candidates, key=lambda score: (score.accuracy, -score.model.step))
    numbers = (
        f"best candidate {best.model.title} scores {best.accuracy:.4f}, last observed step {observed.model.step}"
        f" {observed.accuracy:.4f}, on {best.n} problems of {best.benchmark}"
    )
    if best.accuracy <= observed.accuracy - margin:
        behind = "is ahead of" if margin == 0 else f"is within {margin:g} of"
        return None, f"No candidate {behind} the last observed checkpoint on the selection benchmark: {numbers}."
    return best, f"Chosen on the selection benchmark: {numbers}."


def _rank(score: Score) -> tuple[float, int]:
    # Of equals the one that reaches least far.
    return -score.accuracy, score.model.step
