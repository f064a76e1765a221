"""One window from its observed steps to a verdict: predict, search on selection, gate, guards.

The stages are handed in, so that the same procedure runs as Prefect tasks, on its own in a benchmark, and on made-up
scores in a simulation.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from evaluation.child import kept_children
from evaluation.verdict.gate import Gate
from flows.decide.choose import choose
from flows.decide.predict import Predicted
from flows.search.halving import search, subsets
from flows.search.ladder import Answered, find
from flows.settings import Settings
from flows.state.decision import Decision, Divergence, Model, Score, guard_verdict
from relex.backtest.convergence import Proposal


class ScoreStage(Protocol):
    """Scores a model on benchmarks; `limit` takes their first problems only (None: all)."""

    def __call__(self, settings: Settings, model: Model, benchmarks: list[str], limit: int | None) -> list[Score]:
        """Return a score a benchmark, in their order."""


@dataclass(frozen=True)
class Stages:
    """What a decision is made of; each takes the settings of the decision first.

    `problems` counts the selection problems, and refuses a gate that shares any. `write` makes models of some rungs of
    a ladder, and `answer` scores one on the first selection problems, one by one. `gate` takes the chosen one, what it
    is compared with, and how many windows share the gate's error: it has to pass against each, so that their number
    needs no correction. `guard` takes the chosen one, the last observed checkpoint, and how many windows, `divergence`
    the chosen one, the last observed and the base. `champion` and `best`, the best observed checkpoint, return at most
    one model.
    """

    problems: Callable[[Settings], int]
    predict: Callable[[Settings, list[int], str], Predicted]
    write: Callable[[Settings, list[int], str, list[Proposal]], Sequence[Model]]
    answer: Callable[[Settings, Model, int | None], Answered]
    base: Callable[[Settings], Model]
    score: ScoreStage
    champion: Callable[[Settings], list[Model]]
    gate: Callable[[Settings, Model, list[Model], int], list[Gate]]
    guard: Callable[[Settings, Model, Model, int], list[Gate]]
    divergence: Callable[[Settings, Model, Model, Model], Divergence]
    best: Callable[[Settings, str], list[Model]] = lambda _settings, _key: []


@kept_children()
def decide(settings: Settings, steps: Sequence[int], key: str, stages: Stages, *, attempt: tuple[int, int]) -> Decision:
    """Decide the window of `steps`; `attempt` is (n, of): it is the n-th of `of` windows that share the gate's error.

    Nothing is scored when the targets were left to the backtest and it says hold.
    """
    problems = stages.problems(settings)
    predicted = stages.predict(settings, list(steps), key)
    decision = Decision(
        settings.training_run,
        key,
        max(steps),
        tuple(steps),
        "keep training",
        f"The backtest says hold: {predicted.backtested.reason}",
        warnings=predicted.warnings,
        backtested=predicted.backtested,
        attempt=attempt[0],
        attempts=attempt[1],
        written=predicted.written,
    )
    if not predicted.candidates and not predicted.ladder:
        return decision
    selection: list[Score] = []
    report: list[Score] = (
        list(stages.score(settings, stages.base(settings), settings.report, None)) if settings.report else []
    )

    def measure(model: Model, count: int) -> Score:
        if count < problems:
            return stages.score(settings, model, [settings.selection], count)[0]
        # In one go: a model is loaded once for all its benchmarks.
        first, *rest = stages.score(settings, model, [settings.selection, *settings.report], None)
        report.extend(rest)
        return first

    selection.append(measure(predicted.observed, problems))
    if predicted.ladder:
        ladder, searched = find(
            predicted.ladder,
            predicted.observed,
            problems=problems,
            batch=settings.batch_size,
            write=lambda proposals: stages.write(settings, list(steps), key, proposals),
            answer=lambda model, limit: stages.answer(settings, model, limit),
            measure=measure,
        )
        decision = replace(decision, ladder=ladder.rungs)
        if ladder.ended:
            decision = replace(decision, warnings=(*decision.warnings, f"The ladder ended early: {ladder.ended}"))
    else:
        sizes = subsets(len(predicted.candidates), problems, batch=settings.batch_size)
        searched = search(predicted.candidates, sizes=sizes, measure=measure)
    selection += searched.finalists
    if settings.targets != "auto" and settings.report:
        # Who names targets wants to see them all.
        report += [
            reported
            for score in searched.dropped
            for reported in stages.score(settings, score.model, settings.report, None)
        ]
    chosen, reason = choose(selection, margin=settings.margin)
    decision = replace(
        decision,
        reason=reason,
        selection=tuple(selection),
        dropped=searched.dropped,
        report=tuple(report),
    )
    if chosen is None:
        return decision
    others = [model for model in stages.best(settings, key) if model.step != predicted.observed.step]
    references = [predicted.observed, *others, *stages.champion(settings)]
    gates = tuple(stages.gate(settings, chosen.model, references, attempt[1]))
    decision = replace(decision, winner=chosen.model, gates=gates)
    if settings.divergence:
        measured = stages.divergence(settings, chosen.model, predicted.observed, stages.base(settings))
        decision = replace(decision, divergence=measured)
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        return replace(decision, reason=f"Not shown to be worth having. {' '.join(gate.sentence for gate in failed)}")
    guards = tuple(stages.guard(settings, chosen.model, predicted.observed, attempt[1])) if settings.guards else ()
    verdict = guard_verdict(guards)
    said = {
        "registered": [*gates, *guards],
        "refused": [guard for guard in guards if guard.verdict == "worse"],
        "not shown": [guard for guard in guards if not guard.passed],
    }
    begins = {
        "registered": "",
        "refused": "It passed the gate and loses elsewhere more than it may. ",
        "not shown": "It passed the gate, and it is not shown that it loses no more than it may elsewhere. ",
    }
    reason = begins[verdict] + " ".join(each.sentence for each in said[verdict])
    return replace(decision, verdict=verdict, guards=guards, reason=reason)
