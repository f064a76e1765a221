"""The real later checkpoint is scored as the prediction was, and the two are paired problem by problem."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.verdict.report import Report
from flows.drift import measure
from flows.drift.announce import announce
from flows.drift.due import look, planned_end
from flows.drift.page import page
from flows.drift.record import read_compared
from flows.settings import Settings
from flows.state.finished import read_finished
from flows.state.records import write_json
from flows.state.snapshot import look_at
from flows.state.windows import decision_path, read_decisions
from tests.helpers.decided_run import KEY, write_decided


@pytest.fixture
def decided(tmp_path: Path) -> Settings:
    return write_decided(tmp_path, drift="accuracy")


def test_the_winner_is_compared_on_gate_and_report_and_what_was_never_scored_is_not(decided: Settings) -> None:
    finished: list[str] = []

    def tell(what: str, done: int, total: int) -> None:
        finished.extend([what] if done == total else [])

    weights = decided.model_copy(update={"drift": "weights"})
    for settings in (weights, decided):
        # What was asked for later is added to what was compared.
        seen = look(settings)
        assert seen is not None
        rows = measure.compare(settings, seen[0], seen[1], tell=tell)
    assert finished == ["compare relex @ 100", "compare expo @ 100", "gate @ 100", "report @ 100"]
    by_method = {row.method: row for row in rows}
    assert by_method["expo"].accuracies == ()
    gate, report = by_method["relex"].accuracies
    assert (gate.benchmark, report.benchmark) == ("gate", "report")
    kept = [Report.read(path) for path in (decided.home / "evaluations").glob("gate-*/report.json")]
    assert {checkpoint.accuracy for checkpoint in kept} == {gate.predicted, gate.real}
    assert gate.difference == pytest.approx(gate.predicted - gate.real)
    assert gate.low <= gate.difference <= gate.high
    assert read_compared(decided) == sorted(rows, key=lambda row: row.method)
    assert f"relex @ 100 scores {gate.predicted:.4f} on 12 problems of gate, real step 100" in page("tiny", rows)
    # The copy that was scored is gone, and nothing is asked again.
    assert not (decided.home / "drift" / "real").exists()
    again = look(decided)
    assert again is not None
    assert again[1] == []


def test_a_run_is_on_record_at_its_planned_end_though_no_prediction_stands_for_it(decided: Settings) -> None:
    settings = decided.model_copy(update={"total_steps": 100})
    (decision,) = read_decisions(settings)
    assert decision.winner is not None
    # A ladder that ended early: what was registered stands for step 30, and the rest fell off.
    winner = replace(decision.winner, step=30)
    report = (replace(decision.report[0], model=winner),)
    write_json(
        decision_path(settings, KEY),
        replace(decision, winner=winner, report=report, selection=decision.selection[:1]).to_json(),
    )
    now = look_at(settings, settings.checkpoints)
    end = planned_end(settings, now.stored, now.ever)
    assert end is not None
    assert end.step == 100
    events, _ = announce(settings, now.stored, now.ledger, now=now.now)
    assert [event.payload["target"] for event in events] == [100]

    measure.compare(settings, now.base, [])
    ((look_at_end,),) = read_finished(settings.state)
    assert (look_at_end.window, look_at_end.end, look_at_end.benchmark, look_at_end.n) == (25, 100, "report", 12)
    kept = {Report.read(path).accuracy for path in (settings.home / "evaluations").glob("report-*/report.json")}
    assert {look_at_end.winner, look_at_end.real} == kept
    # Once: neither asked for nor announced again, and the copy of the end is gone.
    assert planned_end(settings, now.stored, now.ever) is None
    assert announce(settings, now.stored, now.ledger, now=now.now) == ([], {})
    assert not (settings.home / "drift" / "real").exists()
