"""Old predictions against real later checkpoints, on stores that go straight, turn, are pruned, resumed, cut short."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flows.decide.predict import predict
from flows.drift import measure
from flows.drift.announce import announce, write_sent
from flows.drift.due import Reached, Waiting, look
from flows.drift.page import page, summary, warnings
from flows.drift.record import Compared, comparing, mark_shown, read_compared, was_shown
from flows.settings import Settings
from flows.state.decision import Decision, Score
from flows.state.events import TARGET_REACHED
from flows.state.ledger import Ledger, known, read_ledger, write_ledger
from flows.state.records import write_json
from flows.state.windows import decision_path, window_key
from relex.store import StoredCheckpoint, open_base, scan
from tests.helpers.cli import relex

WINDOW = (10, 25, 40)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write checkpoint-N of a run that goes straight, or that turns by a right angle at step `turn`; 0 is the base."""

    def write(step: int, *, turn: int = 10_000, seed: int = 1) -> Path:
        path = tmp_path / ("base" if step == 0 else f"run/checkpoint-{step}")
        path.mkdir(parents=True, exist_ok=True)
        before, after = min(step, turn), max(0, step - turn)
        start, slope, other = (torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in (0, seed, 9))
        save_file({"weight": start + 1e-2 * (before * slope - after * other)}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
        if step:
            (path / "trainer_state.json").write_text("{}")
        return path

    return write


def store(settings: Settings) -> tuple[StoredCheckpoint, ...]:
    return scan(settings.checkpoints, open_base(settings.base), now=time.time())


def remember(settings: Settings) -> Ledger:
    """Let the ledger know what the store has, as the watcher does."""
    ledger = read_ledger(settings)
    ledger = replace(ledger, checkpoints=known(store(settings), ledger, now=time.time()))
    write_ledger(settings, ledger)
    return ledger


def decide(
    settings: Settings,
    write: Write,
    *,
    methods: Sequence[str] = ("relex",),
    targets: Sequence[int] = (100, 200),
    promised: float | None = 0.4,
) -> Decision:
    """Predict from the window and keep a decision that registered the first of the candidates."""
    for step in (0, *WINDOW):
        write(step)
    remember(settings)
    settings = settings.model_copy(update={"methods": list(methods), "targets": list(targets)})
    key = window_key(settings, open_base(settings.base), list(store(settings)))
    predicted = predict(settings, WINDOW, key)
    models = [predicted.observed, *(replace(model, skill_at_least=promised) for model in predicted.candidates)]
    scores = [Score(model, "selection", 0.5, 0.02, 500) for model in models]
    decision = Decision(
        settings.training_run,
        key,
        WINDOW[-1],
        WINDOW,
        "registered",
        "because",
        written=predicted.written,
        selection=tuple(scores[:2]),
        dropped=tuple(scores[2:]),
        winner=models[1],
        registered="tiny-candidates version 1",
    )
    write_json(decision_path(settings, key), decision.to_json())
    return decision


def outlook(settings: Settings) -> tuple[list[Reached], list[Waiting]]:
    seen = look(settings)
    assert seen is not None
    return seen[1], seen[2]


def catch_up(settings: Settings) -> list[Compared]:
    seen = look(settings)
    assert seen is not None
    return measure.compare(settings, seen[0], seen[1])


def skill(row: Compared) -> float:
    assert row.drift is not None
    assert row.drift.skill is not None
    return row.drift.skill


def test_a_run_that_goes_straight_is_where_it_was_predicted_and_nothing_is_warned_of(
    settings: Settings, write: Write
) -> None:
    decide(settings, write, methods=["relex", "expo"])
    assert outlook(settings)[0] == []
    write(100)
    first = catch_up(settings)
    assert [row.title for row in first] == ["relex @ 100", "expo @ 100"]
    assert skill(first[0]) == pytest.approx(1.0, abs=1e-3)
    assert first[0].registered == "tiny-candidates version 1"
    assert first[1].registered == ""
    assert catch_up(settings) == []
    write(200)
    assert [row.title for row in catch_up(settings)] == ["relex @ 200", "expo @ 200"]
    rows = [row for row in read_compared(settings) if row.method == "relex"]
    assert len(rows) == 2
    assert warnings(rows) == []
    assert "none of the 2 of which a skill was expected fell short" in summary(rows)


def test_a_run_that_turns_after_the_window_is_warned_of_with_what_to_do(settings: Settings, write: Write) -> None:
    decide(settings, write)
    write(100, turn=45)
    write(200, turn=45)
    rows = catch_up(settings)
    assert [row.broken for row in rows] == [True, True]
    assert all(skill(row) < 0 for row in rows)
    text = page("tiny", rows)
    assert "2 of 2 predictions were worse than expected" in text
    assert "do not promote tiny-candidates version 1" in text
    assert "decide again on a later one" in text
    assert "- Warning: relex @ 100, from step 40, is worse than expected: at step 100 its skill is -" in text
    assert "| relex @ 200 | 40 | 200 |" in text


def test_where_nothing_was_promised_nothing_is_warned_of_and_a_bad_prediction_is_told(
    settings: Settings, write: Write
) -> None:
    decide(settings, write, promised=None)
    write(100, turn=45)
    rows = catch_up(settings)
    assert warnings(rows) == []
    assert "no nearer than waiting" in page("tiny", rows)


def test_the_rounding_of_the_output_breaks_no_promise(settings: Settings, write: Write) -> None:
    decide(settings, write)
    write(100)
    row = catch_up(settings)[0]
    assert row.drift is not None
    rounded = replace(row, promised=0.5, drift=replace(row.drift, skill=0.45, rounding=0.1))
    assert not rounded.broken
    assert replace(rounded, drift=replace(row.drift, skill=0.45, rounding=0.01)).broken


def test_a_pruned_window_is_not_needed(settings: Settings, write: Write) -> None:
    decide(settings, write)
    write(100)
    for step in WINDOW:
        shutil.rmtree(Path(settings.checkpoints) / f"checkpoint-{step}")
    assert [skill(row) for row in catch_up(settings)] == [pytest.approx(1.0, abs=1e-3)]


def test_models_that_were_deleted_are_not_compared(settings: Settings, write: Write) -> None:
    decision = decide(settings, write)
    write(100)
    shutil.rmtree(decision.dropped[0].model.directory)
    write(200)
    due, waiting = outlook(settings)
    assert [target.before.target for target in due] == [100]
    assert "was deleted" in waiting[0].reason


def later(path: Path, seconds: float) -> None:
    """Let a checkpoint be written so long after now."""
    then = time.time() + seconds
    for each in (*path.iterdir(), path):
        os.utime(each, (then, then))


def test_a_step_that_a_resumed_run_left_behind_is_not_compared_until_it_is_written_again(
    settings: Settings, write: Write
) -> None:
    decide(settings, write)
    later(write(60), 5)
    later(write(100), 10)
    later(write(60), 20)
    remember(settings)
    assert outlook(settings)[0] == []
    later(write(100), 30)
    remember(settings)
    assert [row.step for row in catch_up(settings)] == [100]


@pytest.mark.parametrize("step", [25, 30], ids=["a step of the window again", "another step"])
@pytest.mark.parametrize("pruned", [True, False], ids=["pruned since", "there"])
def test_a_run_that_was_resumed_inside_the_window_is_another_segment(
    settings: Settings, write: Write, step: int, pruned: bool
) -> None:
    decide(settings, write)
    again = write(step, seed=2)
    later(again, 20)
    remember(settings)
    later(write(100, seed=2), 30)
    remember(settings)
    if pruned:
        shutil.rmtree(again)
    due, waiting = outlook(settings)
    assert due == []
    assert {target.reason for target in waiting} == {"the run was resumed, or started anew, before step 40"}


def test_another_run_in_the_same_directory_is_not_what_was_predicted(settings: Settings, write: Write) -> None:
    decide(settings, write)
    shutil.rmtree(settings.checkpoints)
    for number, step in enumerate((15, 30, 100)):
        later(write(step, seed=2), 20 + number)
    assert outlook(settings)[0] == []


@pytest.mark.parametrize(("step", "counts"), [(102, True), (103, True), (104, False), (99, False)])
def test_the_next_checkpoint_stands_for_a_target_that_is_not_saved_when_it_is_near(
    settings: Settings, write: Write, step: int, counts: bool
) -> None:
    decide(settings, write, targets=[100])
    write(step)
    write(150)
    rows = catch_up(settings)
    assert [(row.target, row.step) for row in rows] == ([(100, step)] if counts else [])
    if counts:
        assert f"| relex @ 100 | 40 | {step} |" in page("tiny", rows)
    else:
        assert "no checkpoint at steps 100 to 103, and the run is at step 150" in outlook(settings)[1][0].reason


def test_a_checkpoint_that_is_still_being_written_is_waited_for(settings: Settings, write: Write) -> None:
    decide(settings, write, targets=[100])
    (write(100) / "trainer_state.json").unlink()
    write(102)
    due, waiting = outlook(settings)
    assert due == []
    assert waiting[0].reason == "step 100 is not complete yet"
    write(100)
    assert [row.step for row in catch_up(settings)] == [100]


def test_a_run_that_diverged_is_told_once(settings: Settings, write: Write) -> None:
    decide(settings, write)
    path = write(100) / "model.safetensors"
    save_file({"weight": torch.full((8, 6), float("nan"))}, path)
    later(path.parent, 0)
    row = catch_up(settings)[0]
    assert "weight holds NaN or infinity at step 100" in warnings([row])[0]
    assert catch_up(settings) == []


def test_a_stopped_run_waits_for_nothing(settings: Settings, write: Write) -> None:
    decide(settings, write)
    due, waiting = outlook(settings)
    assert due == []
    assert {target.reason for target in waiting} == {"the run is at step 40"}
    shutil.rmtree(settings.checkpoints)
    assert look(settings) is None


KILLED = """
import os, signal, sys
from pathlib import Path
from flows.drift import measure
from flows.drift.due import look
from flows.drift.record import comparing
from flows.settings import load_settings
settings = load_settings(Path(sys.argv[1]))
base, due, _ = look(settings)
with comparing(settings):
    measure.compare(settings, base, due, tell=lambda *_: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_killed_in_the_middle_it_leaves_nothing_and_is_done_again(
    settings: Settings, write: Write, config: Path
) -> None:
    decide(settings, write)
    write(100)
    child = subprocess.run([sys.executable, "-c", KILLED, str(config)], capture_output=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert read_compared(settings) == []
    with comparing(settings) as mine:
        assert mine
        assert len(catch_up(settings)) == 1


def announced(settings: Settings, now: float) -> list[dict[str, object]]:
    events, sent = announce(settings, store(settings), read_ledger(settings), now=now)
    write_sent(settings, sent)
    assert {event.name for event in events} <= {TARGET_REACHED}
    return [event.payload for event in events]


def test_a_target_is_announced_with_growing_pauses_until_its_comparison_is_shown(
    settings: Settings, write: Write
) -> None:
    decision = decide(settings, write, methods=["relex", "expo"])
    assert announced(settings, 0.0) == []
    write(100)
    remember(settings)
    sent = [second for second in range(0, 1000, 5) for _ in announced(settings, float(second))]
    assert sent == [0, 30, 90, 210, 450, 750]
    with comparing(settings):
        assert announced(settings, 2000.0) == []
    (payload,) = announced(settings, 2000.0)
    assert payload == {
        "training_run": "tiny",
        "key": decision.key,
        "target": 100,
        "step": 100,
        "methods": ["relex", "expo"],
        "attempt": 7,
    }
    rows = catch_up(settings)
    # Compared and not shown, as after a kill between the two.
    assert len(announced(settings, 3000.0)) == 1
    for row in rows:
        mark_shown(settings, row)
    assert all(was_shown(settings, row) for row in rows)
    assert announced(settings, 4000.0) == []


def test_an_announcement_that_is_repeated_after_a_kill_is_the_same_event(settings: Settings, write: Write) -> None:
    decide(settings, write)
    write(100)
    ledger = remember(settings)
    # Killed between sending and keeping that it was sent.
    first, again = (announce(settings, store(settings), ledger, now=now)[0] for now in (10.0, 20.0))
    assert [event.id for event in first] == [event.id for event in again]


def test_switched_off_nothing_is_looked_at(settings: Settings, write: Write) -> None:
    decide(settings, write)
    write(100)
    off = settings.model_copy(update={"drift": "off"})
    assert look(off) is None
    assert announce(off, store(off), remember(off), now=0.0)[0] == []


@pytest.fixture
def relex_drift(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, config: Path
) -> Callable[..., str]:
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: str) -> str:
        status, out, _ = relex(capsys, "drift", config, *arguments)
        assert status == 0
        return out

    return run


def test_the_command_compares_what_is_missing_and_says_what_is_not_reached(
    settings: Settings, write: Write, relex_drift: Callable[..., str]
) -> None:
    write(0)
    (Path(settings.checkpoints)).mkdir()
    assert "No prediction has been compared" in relex_drift()
    decide(settings, write)
    write(100, turn=45)
    out = relex_drift()
    assert "relex @ 100" in out
    assert "worse than expected" in out
    assert "not compared: relex @ 200 (the run is at step 100)" in out
    content = json.loads(relex_drift("--json"))
    assert [(row["target"], row["verdict"]) for row in content["compared"]] == [(100, "worse than expected")]
    assert [row["target"] for row in content["waiting"]] == [200]
    # The pages of the stack show it all the same.
    assert not was_shown(settings, read_compared(settings)[0])


def test_the_command_leaves_to_another_process_what_that_compares(
    settings: Settings, write: Write, relex_drift: Callable[..., str]
) -> None:
    decide(settings, write)
    write(100)
    with comparing(settings):
        assert "not compared: relex @ 100 (another process is at it)" in relex_drift()
    assert read_compared(settings) == []
