"""A run that has come to its planned end becomes one small file: what stopping it would have cost."""

from flows.drift.record import read_compared
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.finished import Finished, keep_finished
from flows.state.windows import read_decisions
from flows.stop.outlook import outlook


def finish(settings: Settings) -> list[Finished]:
    """Keep what every registered winner of this run would have cost, and return it; nothing before the planned end.

    It is told from comparisons by accuracy at the end (`drift: accuracy`), on report problems where there are any.
    """
    # Of a window that was decided twice the later decision counts.
    decisions = {decision.window: decision for decision in read_decisions(settings) if decision.verdict == "registered"}
    looks = [look for decision in decisions.values() for look in _looks(settings, decision)[:1]]
    if looks:
        keep_finished(settings, looks)
    return looks


def _looks(settings: Settings, decision: Decision) -> list[Finished]:
    winner, end = decision.winner, settings.total_steps
    if winner is None or end is None:
        return []
    known = {score.benchmark: score.accuracy for score in decision.report if score.model == winner}
    rows = [row for row in read_compared(settings) if row.key == decision.key and row.step >= end]
    if not rows:
        return []
    rules = {str(rule): points for rule, points in outlook(settings, decision).items()}
    looks: list[Finished] = []
    for row in rows:
        own = (row.method, row.target) == (winner.method, winner.step)
        for pair in row.accuracies:
            scored = pair.predicted if own else known.get(pair.benchmark)
            if scored is not None:
                look = Finished(
                    settings.training_run,
                    decision.key,
                    decision.window,
                    row.step,
                    pair.benchmark,
                    pair.n,
                    scored,
                    pair.real,
                    rules,
                )
                # Problems that decided nothing come first.
                looks.insert(0 if pair.benchmark in known else len(looks), look)
    return looks
