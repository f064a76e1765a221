"""Stopping the training by hand: what stands against it, what it saves, and that it happens once."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from deploy.local.own_code import own_code
from deploy.local.stack import tracking_uri
from deploy.runs import record
from deploy.tracking import connect
from flows.errors import StopError
from flows.settings import Settings
from flows.state.ledger import Ledger, Seen, write_ledger
from flows.state.records import write_json
from flows.state.windows import read_decisions
from flows.stop.execute import Stop, message, read_stop, record_path, stop_training
from flows.stop.plan import saving
from flows.stop.status import Status, confirm, look
from tests.helpers import cli
from tests.helpers.stopped import COMMAND, configure, decided, runs
from tests.helpers.straight_run import WriteCheckpoint

Check = Callable[..., Status]


@pytest.fixture
def store(write_checkpoint: WriteCheckpoint) -> None:
    for step in (0, 10, 20, 25, 40, 60):
        write_checkpoint(step)


@pytest.fixture
def ready(config: Path, store: None) -> Path:
    """The relex.yaml of a decided run, with a command that stops it."""
    configure(config, stop_command=COMMAND, total_steps=200)
    decided(config)
    return config


def stop(config: Path, **how: str) -> Stop:
    settings = configure(config)
    return confirm(settings, look(config, settings), by="ada", **how)  # type: ignore[arg-type]


def standing(config: Path) -> Status:
    return look(config, configure(config))


def test_a_winner_near_the_ceiling_stops_the_training_once_with_its_facts(ready: Path) -> None:
    assert "`relex stop" in standing(ready).sentence
    assert runs(ready) == []
    first = stop(ready)
    assert runs(ready) == ["tiny 40 200 models/relex/step-200 tiny-candidates version 1"]
    assert (first.state, first.exit_status, first.by) == ("stopped", 0, "ada")
    assert stop(ready) == first
    assert len(runs(ready)) == 1
    assert "was stopped at" in standing(ready).sentence


@pytest.mark.parametrize("state", ["stopping", "stopped", "failed", "declined"])
def test_whoever_comes_by_another_way_does_not_do_again_what_is_on_record(ready: Path, state: str) -> None:
    settings = configure(ready)
    seen = look(ready, settings)
    assert seen.order is not None
    # Both looked before either of them did it: only the one that holds the lock knows.
    before = Stop(state, "other", "bob", "2026-11-20T10:00:00+00:00", log="")  # type: ignore[arg-type]
    write_json(record_path(settings), before.to_json())
    done = stop_training(settings, read_decisions(settings)[0], seen.order, by="ada")
    if state == "declined":
        assert (done.state, done.by, len(runs(ready))) == ("stopped", "ada", 1)
        return
    assert done == before == read_stop(settings)
    assert runs(ready) == []
    assert stop_training(settings, read_decisions(settings)[0], seen.order, by="ada", again="allow").by == "ada"
    assert len(runs(ready)) == 1


def test_the_steps_saved_are_counted_from_the_step_the_run_has_reached_by_then(
    ready: Path, write_checkpoint: WriteCheckpoint
) -> None:
    assert "has written step 60 of 200 planned: 140 steps are saved" in standing(ready).sentence
    # The trainer saves once more when it is told to end.
    program = "import shutil; shutil.copytree('run/checkpoint-60', 'run/checkpoint-61')"
    configure(ready, stop_command=[sys.executable, "-c", program])
    done = stop(ready)
    assert done.saving is not None
    assert (done.saving.latest, done.saving.steps, done.saving.of) == (61, 139, "planned")
    assert json.loads(record_path(configure(ready)).read_text())["steps_saved"] == 139


def test_a_checkpoint_that_is_not_whole_is_not_counted(ready: Path, tmp_path: Path) -> None:
    (tmp_path / "run/checkpoint-80").mkdir()
    assert "step 60 of 200" in standing(ready).sentence


def test_while_the_store_is_away_steps_are_counted_from_the_last_one_known(ready: Path, tmp_path: Path) -> None:
    settings = configure(ready)
    (tmp_path / "run").rename(tmp_path / "away")
    known = {str(step): Seen("identity", step) for step in (10, 50)}
    write_ledger(settings, Ledger(checkpoints=known))
    assert saving(settings, read_decisions(settings)[0]).latest == 50


def test_without_a_plan_steps_are_counted_up_to_the_prediction(ready: Path, write_checkpoint: WriteCheckpoint) -> None:
    configure(ready, total_steps=None)
    decided(ready)
    assert "140 steps are saved up to the predicted step 200 (total_steps is not given)" in standing(ready).sentence
    write_checkpoint(220)
    assert "no saved steps are known" in standing(ready).sentence


@pytest.mark.parametrize(
    ("decision", "says"),
    [
        ({"verdict": "keep training", "reason": "Not shown."}, "on window 40 nothing was registered. Not shown."),
        (
            {"at_least": 0.9799},
            "Training on may win at most 2.0 points: on 500 problems of sums the winner scores 0.99",
        ),
        (
            {"at_least": 0.9},
            "at least 0.9000 (95 %), and the ceiling is 1: more than stop_price, 2. The training goes on",
        ),
        ({"at_least": None}, "An earlier version decided, and did not keep what the winner has at least. The training"),
        ({"gates": ()}, "An earlier version decided, and did not keep what the winner has at least. The training"),
    ],
)
def test_what_stands_against_stopping_is_said_and_nothing_is_run(
    ready: Path, decision: dict[str, object], says: str
) -> None:
    decided(ready, **decision)  # type: ignore[arg-type]
    assert says in standing(ready).sentence
    with pytest.raises(StopError) as refusal:
        stop(ready)
    assert says in str(refusal.value)
    assert runs(ready) == []
    assert read_stop(configure(ready)) is None


def test_beyond_the_price_somebody_must_say_so_and_a_refused_candidate_stops_nothing_whoever_says_so(
    ready: Path,
) -> None:
    decided(ready, at_least=0.9)
    assert "--confirm --beyond-price` stops it all the same" in standing(ready).sentence
    assert stop(ready, beyond_price="allow").state == "stopped"
    assert len(runs(ready)) == 1
    record_path(configure(ready)).unlink()
    decided(ready, verdict="keep training")
    with pytest.raises(StopError, match="nothing was registered"):
        stop(ready, beyond_price="allow")


def test_the_newest_registered_winner_counts_also_after_a_later_refusal(ready: Path) -> None:
    decided(ready, window=60, verdict="keep training", winner=None)
    result = standing(ready)
    assert result.order is not None
    assert result.order.window == 40


def test_a_run_that_is_not_decided_finished_or_without_a_way_to_stop_is_left_alone(
    config: Path, store: None, write_checkpoint: WriteCheckpoint
) -> None:
    configure(config, total_steps=60)
    assert standing(config).sentence == "Nothing is decided about tiny yet."
    decided(config)
    assert "neither stop_command nor stop_file" in standing(config).sentence
    configure(config, stop_command=COMMAND)
    assert standing(config).sentence == "The run has written step 60 of 60 planned: nothing is left to stop."
    with pytest.raises(StopError, match="nothing is left to stop"):
        stop(config)
    assert runs(config) == []


def test_a_run_that_was_started_anew_is_not_stopped_on_the_decision_about_another(
    ready: Path, write_checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "run/checkpoint-25")
    path = write_checkpoint(25)
    weights = load_file(path / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, path / "model.safetensors")
    assert standing(ready).sentence.startswith("1 decision was made about tiny, on other checkpoints or settings")
    with pytest.raises(StopError, match="other checkpoints"):
        stop(ready)
    assert runs(ready) == []


def test_a_stop_file_holds_the_facts_and_leaves_nothing_else_behind(ready: Path, tmp_path: Path) -> None:
    configure(ready, stop_command=None, stop_file="signals/STOP")
    first = stop(ready)
    assert first.exit_status is None
    written = json.loads((tmp_path / "signals/STOP").read_text())
    assert written | {"written": ""} == {
        "training_run": "tiny",
        "decision": first.decision,
        "window": 40,
        "target_step": 200,
        "model": "models/relex/step-200",
        "registered": "tiny-candidates version 1",
        "by": "ada",
        "written": "",
    }
    assert [path.name for path in (tmp_path / "signals").iterdir()] == ["STOP"]
    assert "was told to stop at" in standing(ready).sentence


def test_words_need_no_shell_and_what_they_say_is_kept(ready: Path, tmp_path: Path) -> None:
    configure(ready, stop_command=[sys.executable, "-c", "import os; print('$HOME', os.getcwd())"])
    done = stop(ready)
    assert Path(done.log).read_text() == f"$HOME {tmp_path}\n"


def test_a_command_may_import_what_lies_beside_the_config_also_where_relex_does_not(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in own_code({}).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "flows.py").write_text("print('stopped by a script of mine')")
    configure(ready, stop_command=[sys.executable, "-c", "import flows"])
    assert Path(stop(ready).log).read_text() == "stopped by a script of mine\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("echo first; echo no such job >&2; exit 3", "stop_command ended with status 3: no such job (all of it in"),
        ("exit 4", "stop_command ended with status 4: it wrote nothing"),
        (["no-such-program"], "stop_command cannot be started: [Errno 2] No such file"),
    ],
)
def test_a_command_that_fails_is_on_record_and_only_run_again_when_asked(
    ready: Path, command: str | list[str], says: str
) -> None:
    configure(ready, stop_command=command)
    with pytest.raises(StopError) as refusal:
        stop(ready)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)
    configure(ready, stop_command=COMMAND)
    with pytest.raises(StopError, match="--confirm --again` does it again"):
        stop(ready)
    assert runs(ready) == []
    assert stop(ready, again="allow").state == "stopped"
    assert len(runs(ready)) == 1


def test_a_stop_file_that_cannot_be_written_is_a_failure_and_the_command_runs_all_the_same(
    ready: Path, tmp_path: Path
) -> None:
    (tmp_path / "STOP").mkdir()
    configure(ready, stop_file="STOP")
    with pytest.raises(StopError, match=r"stop_file .*STOP cannot be written: Is a directory"):
        stop(ready)
    assert len(runs(ready)) == 1


KILLED = """
import sys
from pathlib import Path
from flows.settings import load_settings
from flows.stop.status import confirm, look
config = Path(sys.argv[1])
settings = load_settings(config)
confirm(settings, look(config, settings), by="ada")
"""


def test_killed_while_the_command_runs_it_is_not_known_and_not_done_again_by_itself(ready: Path) -> None:
    # The command kills the process that runs it, before and after which it leaves a line.
    configure(ready, stop_command=f"{COMMAND}; echo half; kill -9 $PPID")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(ready)], check=False)
    assert killed.returncode == -9
    result = standing(ready)
    assert "It is not known whether the training was stopped: stopping began at" in result.sentence
    assert result.record is not None
    assert Path(result.record.log).read_text() == "half\n"
    configure(ready, stop_command=COMMAND)
    with pytest.raises(StopError, match="not known whether"):
        stop(ready)
    assert len(runs(ready)) == 1
    assert stop(ready, again="allow").state == "stopped"
    assert len(runs(ready)) == 2


def test_of_many_at_once_one_stops_it(ready: Path) -> None:
    configure(ready, stop_command=f"{COMMAND}; sleep 0.1")
    settings = configure(ready)
    seen = look(ready, settings)
    ended: list[str] = []
    start = threading.Barrier(4)

    def once() -> None:
        start.wait()
        ended.append(confirm(settings, seen, by="ada").state)

    threads = [threading.Thread(target=once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ended == ["stopped"] * 4
    assert len(runs(ready)) == 1


def test_a_second_one_that_comes_while_the_command_takes_long_is_told_so(ready: Path, tmp_path: Path) -> None:
    configure(ready, stop_command=f"{COMMAND}; until [ -e go ]; do sleep 0.05; done")
    first = threading.Thread(target=stop, args=(ready,))
    settings = configure(ready)
    seen = look(ready, settings)
    first.start()
    try:
        while not runs(ready):
            threading.Event().wait(0.02)
        with pytest.raises(StopError, match="is being stopped by another process"):
            confirm(settings, seen, by="bob")
    finally:
        (tmp_path / "go").touch()
        first.join()
    assert len(runs(ready)) == 1


def test_a_record_tells_who_and_when(ready: Path) -> None:
    said = message(ready, stop(ready))
    assert said.endswith("by ada. The run has written step 60 of 200 planned: 140 steps are saved.")


STOPPED = """{
 "state": "stopped",
 "decision": "a1b2",
 "by": "ada in the Prefect UI",
 "began": "2026-11-20T10:00:00+00:00",
 "log": "/runs/.relex/tiny/logs/stop.log",
 "file": "/runs/STOP",
 "ended": "2026-11-20T10:00:09+00:00",
 "exit_status": 0,
 "failure": "",
 "saving": {
  "latest": 60,
  "end": 200,
  "of": "planned"
 },
 "steps_saved": 140
}
"""
DECLINED = """{
 "state": "declined",
 "decision": "a1b2",
 "by": "bob",
 "began": "2026-11-20T10:00:00+00:00",
 "log": "",
 "file": "",
 "ended": "",
 "exit_status": null,
 "failure": "",
 "saving": null
}
"""


@pytest.mark.parametrize(("golden", "state", "saved"), [(STOPPED, "stopped", 140), (DECLINED, "declined", None)])
def test_a_record_of_an_earlier_version_is_read_and_is_written_in_the_same_bytes(
    settings: Settings, golden: str, state: str, saved: int | None
) -> None:
    path = record_path(settings)
    path.parent.mkdir(parents=True)
    path.write_text(golden)
    record = read_stop(settings)
    assert record is not None
    assert (record.state, record.saving and record.saving.steps) == (state, saved)
    write_json(path, record.to_json())
    assert path.read_text() == golden


def test_the_command_shows_and_does_nothing_until_it_is_confirmed(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    relex = partial(cli.relex, capsys, "stop", ready, "--home", tmp_path / "home")

    status, out, _ = relex()
    assert (status, runs(ready)) == (0, [])
    assert "140 steps are saved" in out
    assert relex("--again")[0] == 2
    result = decided(ready, at_least=0.9)
    assert relex()[0] == 0
    status, _, err = relex("--confirm")
    assert (status, len(err.splitlines())) == (1, 1)
    assert err.startswith("relex: StopError: Training on may win at most 10.0 points")
    status, out, _ = relex("--confirm", "--beyond-price", "--json")
    assert status == 0
    assert json.loads(out)["record"]["state"] == "stopped"
    assert json.loads(out)["record"]["steps_saved"] == 140
    assert len(runs(ready)) == 1
    # Recorded with the decision's own run in MLflow, by its key.
    uri = tracking_uri(tmp_path / "home")
    run = record("tiny", tracking_uri=uri, key=f"tiny {result.key}", title="").run_id
    assert connect(uri).get_run(run).data.metrics == {"steps_saved": 140, "stopped_at_step": 60}
