"""A finished run: what came of it is kept when its planned end is compared."""

from dataclasses import replace
from pathlib import Path

import pytest

from flows.drift.finish import finish
from flows.drift.record import Compared, keep
from flows.settings import Settings
from flows.state.decision import Model, Score
from flows.state.finished import read_finished
from flows.state.overtaken import Paired
from tests.helpers.stopped import configure, decided
from tests.helpers.straight_run import WriteCheckpoint

WINNER = Model("candidate", 120, "models/relex/step-120", "relex", "d1")


@pytest.fixture
def ready(config: Path, write_checkpoint: WriteCheckpoint) -> Path:
    for step in (0, 10, 20, 25, 40):
        write_checkpoint(step)
    return config


def compared(settings: Settings, key: str, target: int, *accuracies: Paired) -> Compared:
    row = Compared(key, 40, "relex", target, target, None, "", "accuracy", None, accuracies=accuracies)
    keep(settings, row)
    return row


def test_what_stopping_would_have_cost_is_kept_at_the_planned_end_and_not_before(ready: Path) -> None:
    settings = configure(ready, total_steps=200)
    report = (Score(WINNER, "report", 0.70, 0.01, 400),)
    key = decided(ready, winner=WINNER, report=report).key
    compared(settings, key, 120, Paired("report", 400, 0.70, 0.66, 0.04, 0.0, 0.08))
    assert finish(settings) == []
    compared(settings, key, 200, Paired("report", 400, 0.72, 0.81, -0.09, -0.12, -0.06))
    (look,) = finish(settings)
    assert (look.benchmark, look.n, look.winner, look.real, look.end) == ("report", 400, 0.70, 0.81, 200)
    assert look.cost == pytest.approx(11.0)
    assert look.rules["ceiling"] == pytest.approx(1.5)
    assert finish(settings) == [look]
    assert read_finished(settings.state) == [(look,)]


def test_without_a_plan_a_winner_or_an_accuracy_nothing_is_finished(ready: Path) -> None:
    settings = configure(ready)
    decision = decided(ready, winner=replace(WINNER, step=200))
    compared(settings, decision.key, 200, Paired("sums", 500, 0.9, 0.95, -0.05, -0.07, -0.03))
    assert finish(settings) == []
    settings = configure(ready, total_steps=200)
    # The winner itself stands for the end: the problems of the gate do.
    decision = decided(ready, winner=replace(WINNER, step=200))
    compared(settings, decision.key, 200, Paired("sums", 500, 0.9, 0.95, -0.05, -0.07, -0.03))
    assert [round(look.cost, 6) for look in finish(settings)] == [5.0]
    settings = configure(ready, total_steps=200, attempts=5)
    decision = decided(ready, winner=replace(WINNER, step=200), verdict="keep training")
    compared(settings, decision.key, 200)
