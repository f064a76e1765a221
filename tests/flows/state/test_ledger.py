import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.settings import Settings
from flows.state.events import CHECKPOINT_READY, WINDOW_READY, Event
from flows.state.ledger import Ledger, left_behind, read_ledger, write_ledger
from flows.state.records import write_json
from flows.state.snapshot import Snapshot
from flows.state.windows import claim, claimed, decision_path, window_key
from flows.watch.announce import full_window, tick
from flows.watch.due import DueWindow
from flows.watch.watcher import describe
from relex.layouts.weights import Weights
from relex.store import StoredCheckpoint, open_base, scan
from tests.helpers.straight_run import WriteCheckpoint, make_old


def look(settings: Settings, ledger: Ledger, now: float) -> tuple[list[Event], Ledger]:
    base, stored = store(settings, now)
    return tick(settings, Snapshot(base, ledger, stored, now), end=settings.end)


def store(settings: Settings, now: float) -> tuple[Weights, tuple[StoredCheckpoint, ...]]:
    base = open_base(settings.base)
    return base, scan(settings.checkpoints, base, now=now)


def names(events: list[Event]) -> list[str]:
    return [event.name for event in events]


def test_each_checkpoint_is_announced_once_and_the_window_when_it_is_full(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    write_checkpoint(0)
    write_checkpoint(10)
    now = time.time()
    events, ledger = look(settings, Ledger(), now)
    assert names(events) == [CHECKPOINT_READY]
    write_checkpoint(25)
    write_checkpoint(40)
    events, ledger = look(settings, ledger, now)
    assert names(events) == [CHECKPOINT_READY, CHECKPOINT_READY, WINDOW_READY]
    assert events[-1].payload["steps"] == [10, 25, 40]
    assert look(settings, ledger, now)[0] == []


def test_a_watcher_started_again_finds_what_was_announced(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 40):
        write_checkpoint(step)
    now = time.time()
    first, ledger = look(settings, Ledger(), now)
    write_ledger(settings, ledger)
    assert look(settings, read_ledger(settings), now)[0] == []
    # Killed between sending and writing: the same events again, under the same ids.
    again, _ = look(settings, Ledger(), now + 5)
    assert [event.id for event in again] == [event.id for event in first]


def test_an_unclaimed_window_is_announced_again_with_growing_pauses(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 40):
        write_checkpoint(step)
    start = time.time()
    ledger, sent = Ledger(), []
    for second in range(0, 1000, 5):
        events, ledger = look(settings, ledger, start + second)
        sent += [second for event in events if event.name == WINDOW_READY]
    assert sent == [0, 30, 90, 210, 450, 750]


def test_a_claimed_or_decided_window_is_not_announced_again(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 40):
        write_checkpoint(step)
    start = time.time()
    events, ledger = look(settings, Ledger(), start)
    key = events[-1].payload["key"]
    with claim(settings, key) as mine:
        assert mine
        assert look(settings, ledger, start + 100)[0] == []
    assert names(look(settings, ledger, start + 100)[0]) == [WINDOW_READY]
    write_json(decision_path(settings, key), {})
    assert look(settings, ledger, start + 100)[0] == []


@pytest.fixture
def other_process(settings: Settings, config: Path) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from flows.state.windows import claim; from flows.settings import load_settings\n"
        "with claim(load_settings(Path(sys.argv[1])), 'abc') as mine: print(mine, flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(config)], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.wait()


def test_a_claim_goes_with_its_process_however_that_ends(
    settings: Settings, other_process: subprocess.Popen[str]
) -> None:
    assert other_process.stdout is not None
    assert other_process.stdout.readline().strip() == "True"
    assert claimed(settings, "abc")
    with claim(settings, "abc") as mine:
        assert not mine
    os.kill(other_process.pid, signal.SIGKILL)
    other_process.wait()
    assert not claimed(settings, "abc")
    with claim(settings, "abc") as mine:
        assert mine


def test_a_window_with_a_checkpoint_that_is_not_ready_is_not_due(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 40, 50):
        write_checkpoint(step)
    half = write_checkpoint(25)
    (half / "model.safetensors").write_bytes((half / "model.safetensors").read_bytes()[:50])
    now = time.time()
    assert full_window(store(settings, now)[1], settings.end) == []
    make_old(half)
    assert full_window(store(settings, now)[1], settings.end) == []


def test_a_window_ends_with_the_first_checkpoint_at_or_after_it(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 25):
        write_checkpoint(step)
    now = time.time()
    assert full_window(store(settings, now)[1], settings.end) == []
    write_checkpoint(60)
    assert full_window(store(settings, now)[1], settings.end) == [10, 25]


def test_a_window_whose_checkpoints_were_pruned_is_not_announced(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 20, 30):
        write_checkpoint(step)
    now = time.time()
    _, ledger = look(settings, Ledger(), now)
    shutil.rmtree(Path(settings.checkpoints) / "checkpoint-10")
    write_checkpoint(40)
    events, ledger = look(settings, ledger, now)
    assert names(events) == [CHECKPOINT_READY]
    stored = store(settings, now)[1]
    assert (
        "steps 10 were observed and have been removed" in describe(settings, stored, ledger, DueWindow(settings.end))[1]
    )


def test_a_run_started_anew_in_the_same_directory_is_a_new_run(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 20, 40):
        write_checkpoint(step)
    now = time.time()
    _, ledger = look(settings, Ledger(), now)
    shutil.rmtree(settings.checkpoints)
    write_checkpoint(20)
    _, ledger = look(settings, ledger, now)
    assert list(ledger.checkpoints) == ["20"]
    write_checkpoint(40)
    assert WINDOW_READY in names(look(settings, ledger, now)[0])


def behind(settings: Settings, ledger: Ledger, now: float) -> set[int]:
    return left_behind(store(settings, now)[1], ledger.checkpoints)


def test_a_run_beyond_its_window_is_not_said_to_be_in_it(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    lines = []
    for steps in ((0, 10, 20), (30, 40, 50)):
        for step in steps:
            write_checkpoint(step)
        _, ledger = look(settings, Ledger(), time.time())
        due = DueWindow(settings.end)
        lines.append(describe(settings, store(settings, time.time())[1], ledger, due)[1])
    assert lines == [
        "tiny: step 20 of window 40, 2 checkpoints observed",
        "tiny: step 50, 4 checkpoints in window 40; window full",
    ]


def rewrite(settings: Settings, write_checkpoint: WriteCheckpoint, step: int) -> None:
    shutil.rmtree(Path(settings.checkpoints) / f"checkpoint-{step}")
    write_checkpoint(step)


def test_a_resumed_run_never_mixes_with_what_it_left_behind(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 20, 30, 40):
        write_checkpoint(step)
    now = time.time()
    events, ledger = look(settings, Ledger(), now)
    first = events[-1].payload["key"]
    # Resumed from step 10: 20 is written again while 30 and 40 are still the old ones, and the window looks full.
    rewrite(settings, write_checkpoint, 20)
    events, ledger = look(settings, ledger, now)
    assert names(events) == [CHECKPOINT_READY]
    assert behind(settings, ledger, now) == {30, 40}
    write_ledger(settings, ledger)
    events, ledger = look(settings, read_ledger(settings), now + 2)
    assert events == []
    said = describe(settings, store(settings, now)[1], ledger, DueWindow(settings.end))[1]
    assert "steps 30, 40 were left behind by a run that resumed before them" in said
    rewrite(settings, write_checkpoint, 30)
    events, ledger = look(settings, ledger, now + 4)
    assert names(events) == [CHECKPOINT_READY]
    assert behind(settings, ledger, now) == {40}
    rewrite(settings, write_checkpoint, 40)
    events, ledger = look(settings, ledger, now + 6)
    assert names(events) == [CHECKPOINT_READY, WINDOW_READY]
    assert behind(settings, ledger, now) == set()
    assert events[-1].payload["key"] != first


def test_what_a_resumed_run_left_behind_may_be_deleted(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    for step in (0, 10, 20, 30, 40):
        write_checkpoint(step)
    now = time.time()
    _, ledger = look(settings, Ledger(), now)
    rewrite(settings, write_checkpoint, 20)
    _, ledger = look(settings, ledger, now)
    for step in (30, 40):
        shutil.rmtree(Path(settings.checkpoints) / f"checkpoint-{step}")
    _, ledger = look(settings, ledger, now)
    assert behind(settings, ledger, now) == set()
    write_checkpoint(60)
    events, _ = look(settings, ledger, now)
    assert events[-1].payload["steps"] == [10, 20]


def test_the_key_names_the_files_and_the_settings_that_decide(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 40):
        write_checkpoint(step)
    base, stored = store(settings, time.time())
    key = window_key(settings, base, list(stored))
    assert key == window_key(settings.model_copy(update={"memory": 1, "threads": 7}), base, list(stored))
    assert key != window_key(settings.model_copy(update={"margin": 0.1}), base, list(stored))
    assert key != window_key(settings, base, list(stored[:1]))


def test_whatever_decides_is_part_of_the_key(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    for step in (0, 10):
        write_checkpoint(step)
    base, stored = store(settings, time.time())
    others: dict[str, object] = {
        **{"training_run": "other", "window": 7, "targets": [77], "total_steps": 777, "methods": ["raw"]},
        **{"attempts": 5, "margin": 0.1, "confidence": 0.8, "selection": "other", "gate": "other", "report": ["other"]},
        **{"registered_model": "other", "dtype": "float64", "batch_size": 7, "backend": "other"},
    }
    keys = {window_key(settings.model_copy(update={name: other}), base, list(stored)) for name, other in others.items()}
    assert len(keys | {window_key(settings, base, list(stored))}) == len(others) + 1
    (Path(settings.base) / "model.safetensors").touch()
    again, _ = store(settings, time.time())
    assert window_key(settings, again, list(stored)) != window_key(settings, base, list(stored))
