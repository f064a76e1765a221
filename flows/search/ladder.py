"""The ladder: automatic targets are predicted and scored from the nearest, each direction until its scores fall.

Weights do not tell how far a line holds, scores do. A direction ends after two rungs in a row that are worse than its
best, the last observed checkpoint among them, by more than two standard errors, paired on the first selection problems.
What is never reached is never written.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from evaluation.verdict.report import Report
from flows.errors import WindowError
from flows.search.halving import Search, first_subset, narrow
from flows.state.decision import Model, Rung, Score
from relex.backtest.convergence import Proposal

# So many worse rungs in a row end a direction.
PATIENCE = 2
# Worse by so many standard errors of the paired difference.
ERRORS = 2.0


@dataclass(frozen=True)
class Answered:
    """A model's score on the first problems, and the score of each of them."""

    score: Score
    each: tuple[float, ...]


def score(model: Model, report: Report) -> Score:
    """Return what a table shows of a report."""
    low, high = report.interval
    answers = report.n * int(report.settings.get("samples") or 1)
    return Score(
        model, report.benchmark, report.accuracy, report.standard_error, report.n, low, high, answers, report.seconds
    )


def answered(model: Model, report: Report) -> Answered:
    """Return what a ladder looks at of a report."""
    return Answered(score(model, report), tuple(each for _, each in report.scores))


@dataclass(frozen=True)
class Ladder:
    """Every rung in the order it was climbed, and its score; `ended` says why before its end, if it did."""

    rungs: tuple[Rung, ...]
    scores: tuple[Score, ...]
    ended: str = ""

    def split(self) -> tuple[list[Score], list[Score]]:
        """Return the scores of what may be the best, and of what was worse than the best below it."""
        fair = [score for rung, score in zip(self.rungs, self.scores, strict=True) if not rung.worse]
        return fair, [score for rung, score in zip(self.rungs, self.scores, strict=True) if rung.worse]


@dataclass
class _Direction:
    """What is left to climb of one method, its best so far, and how many rungs in a row were worse than that."""

    left: list[Proposal]
    best: Answered
    worse: int = 0
    due: list[Proposal] = field(default_factory=list)

    def take(self) -> list[Proposal]:
        """Return the rungs that will be climbed whatever the first of them shows."""
        count = PATIENCE - self.worse
        self.due, self.left = self.left[:count], self.left[count:]
        return self.due

    def judge(self, rung: Answered) -> bool:
        """Return whether a rung is worse than the best, which it is from now on if it scores higher."""
        is_worse = falls(rung.each, self.best.each)
        self.worse = self.worse + 1 if is_worse else 0
        if rung.score.accuracy > self.best.score.accuracy:
            self.best = rung
        return is_worse


def find(
    proposals: Sequence[Proposal],
    observed: Model,
    *,
    problems: int,
    batch: int,
    write: Callable[[list[Proposal]], Sequence[Model]],
    answer: Callable[[Model, int | None], Answered],
    measure: Callable[[Model, int], Score],
) -> tuple[Ladder, Search]:
    """Climb on the fewest problems, and let what did not fall go through ever more of them, all `problems` at last.

    `answer` scores a model on the first problems (None: all), one by one, and `measure` in the rounds after the first.
    """
    first, *larger = first_subset(problems, batch=batch)
    limit = first if larger else None
    ladder = climb(proposals, observed=answer(observed, limit), write=write, answer=lambda model: answer(model, limit))
    fair, worse = ladder.split()
    searched = narrow(fair, sizes=larger or [problems], measure=measure)
    return ladder, Search(searched.finalists, (*worse, *searched.dropped))


def climb(
    proposals: Sequence[Proposal],
    *,
    observed: Answered,
    write: Callable[[list[Proposal]], Sequence[Model]],
    answer: Callable[[Model], Answered],
) -> Ladder:
    """Climb the proposals of every method from the nearest; `write` makes models of some, in one pass, in their order.

    Written at once is what is climbed for certain. When the store loses the window meanwhile, the ladder ends there.
    """
    directions: dict[str, _Direction] = {}
    for proposal in proposals:
        directions.setdefault(proposal.method, _Direction([], observed)).left.append(proposal)
    rungs: list[Rung] = []
    scores: list[Score] = []
    while due := [proposal for direction in directions.values() for proposal in direction.take()]:
        try:
            models = write(due)
        except WindowError as error:
            if not rungs:
                raise
            return Ladder(tuple(rungs), tuple(scores), ended=str(error))
        for proposal, model in zip(due, models, strict=True):
            answers = answer(model)
            is_worse = directions[proposal.method].judge(answers)
            rungs.append(Rung(model.method, model.step, answers.score.accuracy, answers.score.n, is_worse))
            scores.append(answers.score)
        for direction in directions.values():
            if direction.worse >= PATIENCE:
                direction.left.clear()
    return Ladder(tuple(rungs), tuple(scores))


def falls(each: Sequence[float], best: Sequence[float]) -> bool:
    """Return whether scores are below the best ones on the same problems by more than two standard errors."""
    differences = [ours - theirs for ours, theirs in zip(each, best, strict=True)]
    mean = math.fsum(differences) / len(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return mean < -ERRORS * error
