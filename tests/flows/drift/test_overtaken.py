"""A registered version that the run has overtaken: drift speaks of it first."""

import io

from flows.console import Terminal
from flows.drift.page import overtaken, page, show
from flows.drift.record import Compared
from flows.state.ledger import Seen
from flows.state.overtaken import Against, Paired
from flows.state.scored import Scored
from relex.drift import Drift


def row(method: str, registered: str, pair: Paired) -> Compared:
    measured = Drift(0.3, 0.9, 1.1, 2.0, None, 0.0)
    return Compared("key", 40, method, 100, 130, None, registered, "accuracy", measured, accuracies=(pair,))


BEATEN = row("relex", "tiny-candidates version 1", Paired("gate", 400, 0.5, 0.744, -0.244, -0.29, -0.2))
OTHER = row("expo", "", Paired("report", 400, 0.4, 0.744, -0.344, -0.4, -0.3))


def scored(step: int, difference: float) -> Scored:
    pair = Paired("selection", 400, 0.5, 0.5 - difference, difference, difference - 0.05, difference + 0.05)
    return Scored(step, Seen("", 1), None, against=Against("tiny-candidates version 1", "relex @ 100", step, pair))


def test_drift_speaks_of_the_registered_version_first() -> None:
    line = (
        "Real step 130 scores 24.4 points more than tiny-candidates version 1 (relex @ 100): 0.7440 and 0.5000 on 400"
        " problems of gate, 20.0 to 29.0 points with 95 % confidence."
    )
    assert overtaken([OTHER, BEATEN]) == [line]
    file = io.StringIO()
    show(Terminal(file=file, width=200), [OTHER, BEATEN], [])
    lines = file.getvalue().splitlines()
    assert lines[0] == line
    assert [line.split()[0] for line in lines[1:] if " @ 100 " in line][:2] == ["relex", "expo"]
    text = page("tiny", [OTHER, BEATEN])
    assert text.splitlines()[2] == line
    assert text.count("0.7440") == 2


def test_of_several_checkpoints_that_beat_one_version_the_last_is_said() -> None:
    rows: list[Compared | Scored] = [BEATEN, scored(200, -0.1)]
    (line,) = overtaken(rows)
    assert line.startswith("Real step 200 scores 10.0 points more than tiny-candidates version 1")
    assert overtaken([scored(200, 0.1), Scored(250, Seen("", 1), None)]) == []


def test_what_the_interval_does_not_tell_apart_is_not_overtaken() -> None:
    assert overtaken([row("relex", "tiny-candidates version 1", Paired("gate", 40, 0.5, 0.6, -0.1, -0.2, 0.01))]) == []
