"""Files that earlier versions wrote are read; those in golden/ are of one that called comparisons looks."""

import json
from dataclasses import asdict
from pathlib import Path
from uuid import UUID

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from flows.decide.gate_results import GateResults
from flows.drift.record import Compared
from flows.errors import PromotionError
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.events import Event, Sent
from flows.state.ledger import Ledger, Seen
from flows.state.records import read_json, write_json
from flows.watch import outbox

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
    # It counted no looks, knew no clusters, and was never shown to be worse.
    before["gates"][0] |= dict.fromkeys(("look", "error", "candidate_at_least", "upper_bound", "clusters"))
    before["gates"][0]["comparisons"] = before["gates"][0].pop("looks")
    # What it could not say: what a score cost, what was climbed, and where the page is.
    assert now.pop("ladder") == []
    assert now.pop("page_url") == ""
    # What was not asked for.
    assert (now.pop("guards"), now.pop("divergence")) == ([], None)
    for score in (*now["selection"], *now["dropped"], *now["report"]):
        assert (score.pop("answers"), score.pop("seconds")) == (0, 0.0)
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


def test_gate_results_of_an_earlier_version_are_read_number_by_number() -> None:
    before = json.loads((GOLDEN / "gate_results.json").read_bytes())
    results = GateResults.from_json(json.dumps(before))
    assert results.comparisons == before["looks"] == 3
    now = json.loads(json.dumps(results.to_json()))
    before["comparisons"] = before.pop("looks")
    before["look"] = None
    # As text: True is not 1, and 1 is not 1.0.
    assert json.dumps(now) == json.dumps(before)
    assert GateResults.from_json(json.dumps(now)) == results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "have format 2, this relex reads 1"),
        ({"margin": None}, "cannot be read .margin: "),
        ({"candidate": {}}, "cannot be read .candidate.model: "),
        ({"looks": "three"}, "cannot be read .looks: "),
    ],
)
def test_gate_results_that_are_something_else_are_refused_in_one_line(change: dict[str, object], message: str) -> None:
    content = json.loads((GOLDEN / "gate_results.json").read_bytes()) | change
    with pytest.raises(PromotionError, match=message) as refused:
        GateResults.from_json(json.dumps(content))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", "null"])
def test_a_text_that_is_no_gate_results_is_refused(text: str) -> None:
    with pytest.raises(PromotionError, match="gate results cannot be read"):
        GateResults.from_json(text)


def test_events_are_kept_as_the_bytes_of_an_earlier_version(settings: Settings) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        for number in (1, 2):
            payload = {"training_run": "tiny", "step": 10 * number, "path": f"run/checkpoint-{10 * number}"}
            event = Event("relex.checkpoint.ready", UUID(int=number), "relex.run.tiny", payload)
            outbox.keep(settings, [event], now=1699999999.25 + number)
    assert (settings.home / "outbox.json").read_bytes() == (GOLDEN / "outbox.json").read_bytes()


def test_what_an_earlier_version_sent_is_sent_again(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    path = settings.home / "outbox.json"
    path.parent.mkdir(parents=True)
    content = (GOLDEN / "outbox.json").read_bytes()
    path.write_bytes(content)
    monkeypatch.setattr(outbox, "_shown", lambda _: set())
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        outbox.keep(settings, [Event("later", UUID(int=3), "relex.run.tiny", {})], now=1700000002.0)
        again = outbox.due(settings, now=1700000010.5)
    payload = {"training_run": "tiny", "step": 10, "path": "run/checkpoint-10"}
    assert again == [Event("relex.checkpoint.ready", UUID(int=1), "relex.run.tiny", payload)]
    kept = json.loads(path.read_bytes())
    assert kept.pop(str(UUID(int=3)))["sent"] == 1700000002.0
    assert kept.get(str(UUID(int=1))).pop("sent") == 1700000010.5
    before = json.loads(content)
    before[str(UUID(int=1))].pop("sent")
    assert kept == before
