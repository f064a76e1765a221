"""What `relex status` and `relex down NAME` say of single training runs; no server is needed for it."""

import json
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from deploy.local import daemon, stack
from deploy.local.stack import Stack
from flows.decide.page import page
from flows.errors import WatchError
from flows.processes import revive_watchers, spawn_watcher
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.records import write_json
from flows.state.windows import decision_path
from flows.watch.runs import run_of, wait_for_looks
from flows.watch.standing import Standing, wait_for_look, write_standing
from tests.helpers import cli

DECIDED = Decision(
    "tiny", "abc", 40, (10, 20, 40), "keep training", "No candidate is better.", record_url="http://127.0.0.1:5000/#/r"
)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home without servers."""
    home = tmp_path / "home"
    home.mkdir()
    yield home
    stack.down(home)


def watcher(home: Path, config: Path, name: str = "tiny") -> daemon.Daemon:
    """Start something under the name and with the arguments of a watcher."""
    argv = [sys.executable, "-c", "import time; time.sleep(1000)", str(config)]
    return daemon.start(home, f"watcher-{name}", argv, environment={})


def decide(settings: Settings, decision: Decision = DECIDED) -> None:
    path = decision_path(settings, decision.key)
    write_json(path, decision.to_json())
    path.with_name("decision.md").write_text(page(decision, settings))


def test_status_says_of_each_run_what_it_is_at_and_what_was_decided_last(
    home: Path, config: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    started = watcher(home, config)
    assert "tiny: its watcher has not looked yet" in cli.relex(capsys, "status", "--home", home)[1]
    started.log.write_text("12:00 | WARNING | flows.watch.watcher - waiting for room in /x: No space left on device\n")
    assert "tiny: waiting for room in /x: No space left on device\n" in cli.relex(capsys, "status", "--home", home)[1]
    stopped = run_of(replace(started, state="stopped"))
    assert stopped is not None
    assert stopped.text == f"tiny: its watcher is stopped ({started.log})"
    settings.home.mkdir(parents=True)
    write_standing(settings, Standing(time.time(), 25.0, "tiny: step 10 of window 40"))
    decide(settings)
    lines = cli.relex(capsys, "status", "--home", home)[1].splitlines()
    assert lines[-2] == "tiny: step 10 of window 40"
    verdict = "tiny: window 40 is decided, keep training: No candidate is better."
    assert lines[-1] == f"{verdict} http://127.0.0.1:5000/#/r"
    (service,) = json.loads(cli.relex(capsys, "status", "--home", home, "--json")[1])
    assert service["run"]["progress"] == 25.0
    # Of one that does not look any more it is said since when.
    write_standing(settings, Standing(time.time() - 600, 25.0, "tiny: step 10 of window 40"))
    result = run_of(started)
    assert result is not None
    assert result.text.startswith("tiny: step 10 of window 40 (seen 10 minutes ago; ")
    config.rename(config.with_name("moved.yaml"))
    moved = run_of(started)
    assert moved is not None
    assert "relex.yaml cannot be read: No such file" in moved.text


def test_status_of_one_run_is_its_newest_decision_in_full_and_its_log(
    home: Path, config: Path, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    log = watcher(home, config).log
    status, out, _ = cli.relex(capsys, "status", "tiny", "--home", home)
    assert (status, out.splitlines()[1:]) == (
        0,
        [f"nothing is decided yet; relex check {config} says what is in the way", f"log: {log}"],
    )
    decide(settings, replace(DECIDED, key="older", window=20))
    decide(settings)
    status, out, _ = cli.relex(capsys, "status", "tiny", "--home", home)
    assert status == 0
    shown = page(DECIDED, settings).splitlines()
    assert out.splitlines()[1 : 1 + len(shown)] == shown
    place = decision_path(settings, "abc").with_name("decision.md")
    assert out.splitlines()[-2:] == [f"page: {place}", f"log: {log}"]
    told = json.loads(cli.relex(capsys, "status", "tiny", "--home", home, "--json")[1])
    assert told["decision"]["window"] == 40
    status, _, err = cli.relex(capsys, "status", "tine", "--home", home)
    assert (status, err) == (1, f"relex: WatchError: no training run tine is watched in {home}. There are tiny.\n")


def test_down_stops_one_run_for_good_and_all_until_up(
    home: Path, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tiny", "other"):
        watcher(home, config, name)
    assert cli.relex(capsys, "down", "tiny", "--home", home)[0] == 0
    states = {each.name: each.state for each in stack.status(home)}
    assert states == {"watcher-tiny": "stopped", "watcher-other": "running"}
    stack.down(home)
    # A second time changes nothing about what comes back.
    stack.down(home)
    running = Stack(home, "http://127.0.0.1:9", "http://127.0.0.1:9/api", "http://127.0.0.1:9")
    assert [revived.name for revived in revive_watchers(running)] == ["watcher-other"]
    assert [revived.name for revived in revive_watchers(running)] == []


def test_a_watcher_whose_config_was_moved_is_started_from_where_it_is_now(home: Path, config: Path) -> None:
    running = Stack(home, "http://127.0.0.1:9", "http://127.0.0.1:9/api", "http://127.0.0.1:9")
    first = watcher(home, config)
    moved = config.rename(config.with_name("moved.yaml"))
    again = spawn_watcher(running, "tiny", moved)
    assert (again.argv[3], again.pid == first.pid) == (str(moved), False)


def test_another_config_of_a_run_that_is_watched_is_refused(home: Path, config: Path) -> None:
    running = Stack(home, "http://127.0.0.1:9", "http://127.0.0.1:9/api", "http://127.0.0.1:9")
    first = watcher(home, config)
    other = config.with_name("other.yaml")
    other.write_text(config.read_text())
    with pytest.raises(WatchError, match=re.escape(f"is watched by {config} already, and {other} names the same one.")):
        spawn_watcher(running, "tiny", other)
    assert [process.pid for process in stack.status(home)] == [first.pid]


def test_a_watcher_without_room_to_say_anything_is_not_waited_for(home: Path, config: Path) -> None:
    said = "12:00:00.000 | WARNING | flows.watch.watcher - waiting for room in .relex: No space left on device"
    log = home / "logs" / "watcher-tiny.log"
    log.parent.mkdir()
    # What an earlier one logged says nothing of this one.
    log.write_text(f"{said}\n")
    os.utime(log, (0, 0))
    process = watcher(home, config)
    before = time.monotonic()
    wait_for_looks(home, [process], seconds=1.5)
    assert time.monotonic() - before >= 1.5
    log.write_text(f"{said}\n")
    before = time.monotonic()
    wait_for_looks(home, [process], seconds=600)
    assert time.monotonic() - before < 300


def test_a_first_look_is_waited_for_as_long_as_the_watcher_lives(settings: Settings) -> None:
    settings.home.mkdir(parents=True)
    before = time.time()
    write_standing(settings, Standing(before, 0.0, "tiny: an earlier look"))
    assert wait_for_look(settings, before + 1, seconds=60, lives=lambda: False) is None
    assert wait_for_look(settings, before + 1, seconds=0, lives=lambda: True) is None
    result = wait_for_look(settings, before, seconds=0, lives=lambda: True)
    assert result is not None
    assert result.text == "tiny: an earlier look"
