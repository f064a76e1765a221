"""Files that earlier versions wrote are read; those in golden/ are of one that called a gate's comparisons looks."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from pydantic import ValidationError

from flows.drift.record import Compared
from flows.state.decision import Decision
from flows.state.events import Sent
from flows.state.ledger import Ledger, Seen
from flows.state.records import read_json, write_json

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("name", "kind"), [("compared", Compared), ("ledger", Ledger)])
def test_what_an_earlier_version_wrote_is_read_and_written_as_the_same_bytes(
    name: str, kind: type[Compared | Ledger], tmp_path: Path
) -> None:
    path = GOLDEN / f"{name}.json"
    write_json(tmp_path / "again.json", asdict(read_json(path, kind)))
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_decision_of_an_earlier_version_is_read_number_by_number() -> None:
    path = GOLDEN / "decision.json"
    decision = read_json(path, Decision)
    (gate,) = decision.gates
    assert gate.comparisons == 3
    assert gate.confidence_each == pytest.approx(1 - 0.05 / 3)
    before, now = json.loads(path.read_bytes()), json.loads(json.dumps(decision.to_json()))
    before["gates"][0]["comparisons"] = before["gates"][0].pop("looks")
    # One of the numbers is not a number.
    assert json.dumps(now, sort_keys=True) == json.dumps(before, sort_keys=True)
    assert asdict(Decision.from_json(before))["gates"] == asdict(decision)["gates"]


def test_a_ledger_is_what_it_was(tmp_path: Path) -> None:
    assert read_json(GOLDEN / "ledger.json", Ledger) == Ledger(
        {"10": Seen("ab", 1700000000000000001)}, {"key": Sent(2, 1700000000.25)}, {"5": Seen("cd", 1)}
    )


def test_a_file_that_is_something_else_is_refused_and_not_read_as_empty(tmp_path: Path) -> None:
    (tmp_path / "ledger.json").write_text('{"checkpoints": {"10": {"identity": "ab"}}}')
    with pytest.raises(ValidationError, match="written"):
        read_json(tmp_path / "ledger.json", Ledger)
