"""A run that has come to its planned end becomes one small file: what stopping it would have cost."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from flows.drift.record import read_compared
from flows.settings import Settings
from flows.state.decision import Decision, Model
from flows.state.finished import Finished, keep_finished, read_finished
from flows.state.overtaken import Paired
from flows.state.windows import read_decisions
from flows.stop.outlook import outlook

# Pairs a model with the real checkpoint at the planned end on a benchmark; None where that checkpoint is not there.
AtEnd: TypeAlias = Callable[[Model, str], tuple[int, Paired] | None]


def finish(settings: Settings, at_end: AtEnd | None = None) -> list[Finished]:
    """Keep what every registered winner of this run would have cost, and return it; nothing before the planned end.

    It is told from comparisons by accuracy (`drift: accuracy`), on report problems where there are any: from those that
    were made at the end, else from `at_end`, which pairs a winner with the real checkpoint there, and returns its step.
    """
    known = {look.key: look for look in _recorded(settings)}
    looks = []
    for decision in _registered(settings):
        look = _from_comparisons(settings, decision) or known.get(decision.key) or _scored(settings, decision, at_end)
        looks += [] if look is None else [look]
    if looks:
        keep_finished(settings, looks)
    return looks


def unfinished(settings: Settings) -> list[Decision]:
    """Return the decisions whose registered winner is there and was not compared with the planned end.

    None where nothing is asked for: without `drift: accuracy`, and without a planned end.
    """
    if settings.drift != "accuracy" or settings.total_steps is None:
        return []
    done = {look.key for look in _recorded(settings)}
    return [
        decision
        for decision in _registered(settings)
        if decision.key not in done and decision.winner is not None and Path(decision.winner.directory).is_dir()
    ]


def _registered(settings: Settings) -> list[Decision]:
    # Of a window that was decided twice the later decision counts.
    decisions = {decision.window: decision for decision in read_decisions(settings) if decision.verdict == "registered"}
    return list(decisions.values())


def _recorded(settings: Settings) -> list[Finished]:
    return [look for run in read_finished(settings.state) for look in run if look.training_run == settings.training_run]


def _scored(settings: Settings, decision: Decision, at_end: AtEnd | None) -> Finished | None:
    if at_end is None or decision.winner is None or not Path(decision.winner.directory).is_dir():
        return None
    reported = any(score.model == decision.winner for score in decision.report)
    compared = at_end(decision.winner, settings.report[0] if reported else settings.gate)
    if compared is None:
        return None
    step, pair = compared
    return _finished(settings, decision, step, pair, pair.predicted)


def _finished(settings: Settings, decision: Decision, step: int, pair: Paired, winner: float) -> Finished:
    rules = {str(rule): points for rule, points in outlook(settings, decision).items()}
    return Finished(
        settings.training_run, decision.key, decision.window, step, pair.benchmark, pair.n, winner, pair.real, rules
    )


def _from_comparisons(settings: Settings, decision: Decision) -> Finished | None:
    winner, end = decision.winner, settings.total_steps
    if winner is None or end is None:
        return None
    reported = {score.benchmark: score.accuracy for score in decision.report if score.model == winner}
    looks: list[Finished] = []
    for row in read_compared(settings):
        if row.key != decision.key or row.step < end:
            continue
        own = (row.method, row.target) == (winner.method, winner.step)
        for pair in row.accuracies:
            scored = pair.predicted if own else reported.get(pair.benchmark)
            if scored is not None:
                look = _finished(settings, decision, row.step, pair, scored)
                # Problems that decided nothing come first.
                looks.insert(0 if pair.benchmark in reported else len(looks), look)
    return looks[0] if looks else None
