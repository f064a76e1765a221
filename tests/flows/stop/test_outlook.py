"""What training on may win: the ceiling, which decides, and rules that are only shown."""

from dataclasses import replace
from pathlib import Path

import pytest

from flows.settings import Settings
from flows.state.decision import Decision, Model, Score
from flows.stop.outlook import EVIDENCE, outlook, room, sentence, voted
from flows.stop.status import look, unmet
from relex.plots import Point, accuracy_by_step
from tests.helpers import cli
from tests.helpers.stopped import COMMAND, configure, decided, recorded
from tests.helpers.straight_run import WriteCheckpoint

WINNER = Model("candidate", 200, "models/relex/step-200", "relex", "d1", skill_at_least=0.4)


@pytest.fixture
def ready(config: Path, write_checkpoint: WriteCheckpoint) -> Path:
    for step in (0, 10, 20, 25, 40, 60):
        write_checkpoint(step)
    configure(config, stop_command=COMMAND, total_steps=200)
    return config


def observed(step: int, accuracy: float) -> Score:
    return Score(Model("observed", step, "seen"), "sums", accuracy, 0.01, 500)


def refused(config: Path, settings: Settings, window: int, accuracy: float) -> Decision:
    """Write a decision of an earlier window that registered nothing, whose winner stood for step 30."""
    winner = replace(WINNER, step=30, digest=f"d{window}")
    selection = (observed(window, accuracy), Score(winner, "sums", 0.55, 0.01, 500))
    return decided(config, window=window, verdict="keep training", winner=winner, selection=selection, gates=())


@pytest.mark.parametrize(
    ("ceiling", "price", "at_least", "offered"),
    [
        (1.0, 2.0, 0.985, True),
        (1.0, 2.0, 0.975, False),
        (1.0, 3.0, 0.975, True),
        (0.95, 2.0, 0.935, True),
        (0.9, 0.0, 0.95, True),
    ],
)
def test_only_what_the_ceiling_leaves_decides(
    ready: Path, ceiling: float, price: float, at_least: float, offered: bool
) -> None:
    settings = configure(ready, ceiling=ceiling, stop_price=price)
    decision = decided(ready, at_least=at_least)
    left = room(settings, decision)
    assert left is not None
    assert left.points == pytest.approx(max(0.0, 100 * (ceiling - at_least)))
    assert (unmet(ready, settings, decision) == "") == offered
    # What the backtest trusts of the weights says nothing about it.
    assert unmet(ready, settings, replace(decision, backtested=None)) == unmet(ready, settings, decision)


def test_the_other_rules_are_told_with_how_they_did_and_decide_nothing(ready: Path) -> None:
    settings = configure(ready)
    refused(ready, settings, 20, 0.40)
    refused(ready, settings, 25, 0.50)
    selection = (
        observed(40, 0.60),
        Score(replace(WINNER, step=120), "sums", 0.62, 0.01, 500),
        Score(WINNER, "sums", 0.65, 0.01, 500),
    )
    decision = decided(ready, at_least=0.9, selection=selection)
    points = outlook(settings, decision)
    assert points["ceiling"] == pytest.approx(10.0)
    assert points["last rung"] == pytest.approx(3.0)
    # The winner of step 25 stood for step 30 with .55; step 40 has .60.
    assert points["backcast"] == pytest.approx(5.0)
    # From 25 to 40 it won .1 in .678 doublings; to 200 there are 2.32 more, and the winner has .65.
    assert points["growth"] == pytest.approx(29.2, abs=0.1)
    # .02 a step, then a third of it: it falls by a third every ten steps, and .027 are left.
    assert points["forecast"] == pytest.approx(-2.34, abs=0.01)
    said = sentence(points)
    assert said.startswith("Deciding nothing: the ladder's last rung won +3.0 points (tried with a rung")
    assert all(EVIDENCE[rule] in said for rule in points if rule != "ceiling")
    assert look(ready, settings).sentence.endswith(said)
    assert "more than stop_price" in unmet(ready, settings, decision)


def test_a_rule_without_anything_to_go_by_says_nothing(ready: Path) -> None:
    settings = configure(ready)
    assert set(outlook(settings, decided(ready))) == {"ceiling"}
    assert sentence(outlook(settings, decided(ready))) == ""
    assert outlook(settings, decided(ready, verdict="keep training")) == {}


def test_a_record_of_nine_runs_speaks_for_a_rule(ready: Path) -> None:
    settings = configure(ready)
    decision = decided(ready, at_least=0.975)
    recorded(settings, 8)
    assert voted(settings, decision) == []
    assert unmet(ready, settings, decision)
    recorded(settings, 9)
    assert voted(settings, decision) == ["ceiling"]
    assert unmet(ready, settings, decision) == ""
    recorded(settings, 9, costs=[4.0])
    assert voted(settings, decision) == []


def test_the_record_is_listed(ready: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = configure(ready)
    status, text, _ = cli.relex(capsys, "status", "--record", ready)
    assert (status, "0 finished runs. From 9 on a rule may speak for a stop" in text) == (0, True)
    recorded(settings, 9, costs=[1.25])
    _, text, _ = cli.relex(capsys, "status", "--record", ready)
    assert "other-0" in text
    assert "+1.2" in text
    assert "ceiling up to 3.0 points; growth up to 3.0 points." in text
    _, text, _ = cli.relex(capsys, "status", "--record", ready, "--json")
    assert '"votes"' in text


def test_the_figure_shows_what_is_left_to_win(tmp_path: Path) -> None:
    def drawn(room: tuple[float, float] | None) -> bytes:
        path = tmp_path / "figure.png"
        point = Point(40, 0.5, 0.01)
        accuracy_by_step(path, title="", benchmark="", window=(10, 40), real=[point], predicted=[], room=room)
        return path.read_bytes()

    assert drawn(None) == drawn(None) != drawn((0.97, 1.0))
