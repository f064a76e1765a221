"""Made-up models with a known accuracy, on which the whole decision procedure runs without a model.

Two models differ on a tenth of the problems in each direction, more or less by their difference in accuracy: what
independent trainings of one model on MATH do. Candidates differ from each other as much, which makes it hard to choose.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from evaluation.verdict.gate import Gate, gate
from evaluation.verdict.report import Report
from flows.decide.predict import Predicted
from flows.decide.procedure import Stages, decide
from flows.search.ladder import Answered
from flows.settings import Settings
from flows.state.decision import Backtested, Decision, Divergence, Model, Score
from relex.backtest.convergence import Proposal

DISCORDANT = 0.2
_SELECTION, _GATE = "selection", "gate"


class World:
    """One run: the last observed checkpoint, and candidates whose true accuracy differs from its by `differences`.

    `climbed`: they are the rungs of one direction's ladder. `written` are those that were, `asked` the selection
    problems that each model was scored on.
    """

    def __init__(
        self,
        differences: Sequence[float],
        *,
        selection: int,
        gate: int,
        margin: float,
        seed: int,
        accuracy: float = 0.6,
        climbed: bool = False,
    ) -> None:
        random = np.random.default_rng(seed)
        self.settings = Settings(
            training_run="simulated",
            checkpoints="run",
            base="base",
            window="auto",
            max_window=100,
            targets="auto",
            selection=_SELECTION,
            gate=_GATE,
            registered_model="simulated",
            margin=margin,
            batch_size=50,
        )
        self.observed = Model("observed", 48, "observed")
        self.candidates = tuple(Model("candidate", 60 + 12 * row, f"{row}") for row in range(len(differences)))
        self.differences = dict(zip(self.candidates, differences, strict=True))
        self.climbed = climbed
        self.written: list[Model] = []
        self.asked: dict[Model, int] = {}
        self._sizes = {_SELECTION: selection, _GATE: gate}
        self._right: dict[tuple[str, Model], NDArray[np.bool_]] = {}
        for name, count in self._sizes.items():
            held = random.random(count) < accuracy
            self._right[name, self.observed] = held
            for model, difference in self.differences.items():
                won = (DISCORDANT + difference) / 2 / (1 - accuracy)
                lost = (DISCORDANT - difference) / 2 / accuracy
                self._right[name, model] = np.where(held, random.random(count) >= lost, random.random(count) < won)

    def add(self, model: Model, *, like: Model, benchmark: str) -> None:
        """Let a model answer as another one does."""
        self._right[benchmark, model] = self._right[benchmark, like]

    def stages(self) -> Stages:
        """Return what a decision is made of here."""
        backtested = Backtested("trusted", (40, 44, 48), "relex", 1.0, 0.6, 0.5, 96, "")
        rungs = tuple(Proposal("line", model.step, None) for model in self.candidates) if self.climbed else ()
        prediction = Predicted(self.observed, () if rungs else self.candidates, (), backtested, ladder=rungs)
        return Stages(
            problems=lambda settings: self._sizes[_SELECTION],
            predict=lambda settings, steps, key: prediction,
            write=self._write,
            answer=self._answer,
            base=lambda settings: self.observed,
            score=self._score,
            champion=lambda settings: [],
            gate=self._gate,
            guard=lambda settings, winner, observed, comparisons: [],
            divergence=lambda settings, winner, observed, base: Divergence(_GATE, 64, 640, 0.2, 0.1),
        )

    def decide(self, *, attempt: tuple[int, int] = (1, 1)) -> Decision:
        """Decide as for a real run."""
        return decide(self.settings, [24, 48], "key", self.stages(), attempt=attempt)

    def _write(self, settings: Settings, steps: list[int], key: str, proposals: list[Proposal]) -> list[Model]:
        models = {model.step: model for model in self.candidates}
        result = [models[proposal.target_step] for proposal in proposals]
        self.written += result
        return result

    def _answer(self, settings: Settings, model: Model, limit: int | None) -> Answered:
        right = self._right[_SELECTION, model][:limit]
        return Answered(self._score(settings, model, [_SELECTION], limit)[0], tuple(map(float, right)))

    def _score(self, settings: Settings, model: Model, benchmarks: list[str], limit: int | None) -> list[Score]:
        if _SELECTION in benchmarks:
            self.asked[model] = max(self.asked.get(model, 0), limit or self._sizes[_SELECTION])
        return [
            Score(model, name, float(right.mean()), 0.0, len(right), answers=len(right))
            for name in benchmarks
            for right in [self._right[name, model][:limit]]
        ]

    def _gate(self, settings: Settings, winner: Model, references: list[Model], comparisons: int) -> list[Gate]:
        return [
            gate(
                self._report(winner),
                self._report(reference),
                margin=self.settings.margin,
                confidence=self.settings.confidence,
                comparisons=comparisons,
            )
            for reference in references
        ]

    def _report(self, model: Model) -> Report:
        right = self._right[_GATE, model].astype(float).tolist()
        scores = tuple(zip(_problems(len(right)), right, strict=True))
        return Report(model.title, "", _GATE, "", "exact_match", scores, {}, {}, 0.0)


@cache
def _problems(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(count)))
