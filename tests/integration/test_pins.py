"""A real trainer that keeps one checkpoint for one training step, and watchers that keep them all."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import pytest
import yaml

from flows.settings import Settings, load_settings
from flows.state.ledger import read_ledger
from relex.store import State, open_base, scan
from tests.helpers.waiting import wait_for

WINDOW = 20
STEPS = 24

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a module as a process with a log file; all of them are gone when the test ends."""
    started = []

    def run(module: str, *arguments: str | Path | float, log: str) -> subprocess.Popen[str]:
        with (tmp_path / log).open("w") as file:
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", module, *map(str, arguments)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    text=True,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pins") / "base"
    command = [sys.executable, "-m", "flows.demo.pretrain", "--out", str(out), "--steps", "20"]
    subprocess.run(command, check=True, capture_output=True)
    return out


def configure(directory: Path, base: Path, pin: str) -> Path:
    content = {
        "training_run": "pruned",
        "checkpoints": "run",
        "base": str(base),
        "window": WINDOW,
        "targets": [100],
        "selection": "a.yaml",
        "gate": "b.yaml",
        "registered_model": "pruned",
        "poll_seconds": 0.5,
        "pin": pin,
    }
    path = directory / "relex.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def saved(log: Path) -> dict[int, str]:
    return dict(json.loads(line) for line in log.read_text().splitlines()) if log.exists() else {}


def kept(settings: Settings) -> dict[int, str]:
    """Return the digest of the weights of every pinned checkpoint that is ready."""
    return {
        checkpoint.step: sha256((Path(str(checkpoint.directory)) / "model.safetensors").read_bytes()).hexdigest()
        for checkpoint in scan(settings.pins, open_base(settings.base), now=time.time())
        if checkpoint.state is State.READY
    }


@pytest.mark.slow
def test_a_trainer_that_keeps_one_checkpoint_loses_no_step_of_the_window(
    tmp_path: Path, base: Path, start: Start
) -> None:
    settings = load_settings(configure(tmp_path, base, "link"))
    watcher = start("tests.integration.pinning_watcher", tmp_path / "relex.yaml", log="watcher.log")
    wait_for("the watcher", lambda: (settings.home / "watcher.lock").exists())
    log = tmp_path / "saved"
    trainer = start("tests.integration.pruning_trainer", base, settings.checkpoints, STEPS, 0.5, log, log="train.log")
    assert trainer.wait(600) == 0, (tmp_path / "train.log").read_text()
    wait_for("the full window", lambda: "window full" in (tmp_path / "watcher.log").read_text())
    digests = saved(log)
    assert kept(settings) == {step: digests[step] for step in range(1, WINDOW + 1)}
    assert [sent.times for sent in read_ledger(settings).windows.values()] == [1]
    assert [path.name for path in Path(settings.checkpoints).glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    assert not list(settings.pins.rglob("optimizer.pt"))
    watcher.kill()
    watcher.wait()
    # Without pins, what is left of the run says why there is no window.
    configure(tmp_path, base, "none")
    settings.home.joinpath("ledger.json").unlink()
    start("tests.integration.pinning_watcher", tmp_path / "relex.yaml", log="said.log")
    said = "save_total_limit is 1, and a window of 20 steps with a checkpoint every 1 needs 20: the trainer will delete"
    wait_for("the reason", lambda: said in (tmp_path / "said.log").read_text())


@pytest.mark.slow
def test_a_killed_watcher_loses_only_what_was_deleted_while_none_was_running(
    tmp_path: Path, base: Path, start: Start
) -> None:
    settings = load_settings(configure(tmp_path, base, "link"))
    log = tmp_path / "saved"
    first = start("tests.integration.pinning_watcher", tmp_path / "relex.yaml", log="first.log")
    wait_for("the watcher", lambda: (settings.home / "watcher.lock").exists())
    trainer = start("tests.integration.pruning_trainer", base, settings.checkpoints, STEPS, 0.8, log, log="train.log")
    wait_for("five checkpoints", lambda: len(saved(log)) >= 5)
    first.kill()
    first.wait()
    before = len(saved(log))
    wait_for("three more", lambda: len(saved(log)) >= before + 3)
    # However long a watcher takes to start, the run is not over when it does.
    paused = log.with_suffix(".paused")
    paused.touch()
    start("tests.integration.pinning_watcher", tmp_path / "relex.yaml", log="second.log")
    wait_for("the second watcher's look", lambda: (tmp_path / "second.log").read_text() != "")
    paused.unlink()
    assert trainer.wait(600) == 0, (tmp_path / "train.log").read_text()
    wait_for("the hole", lambda: "checkpoints are missing" in (tmp_path / "second.log").read_text())
    digests, pins = saved(log), kept(settings)
    assert pins.items() <= digests.items()
    assert pins.keys() >= set(range(1, before))
    (hole,) = [(low, high) for low, high in zip(sorted(pins), sorted(pins)[1:], strict=False) if high > low + 1]
    assert before - 1 <= hole[0] <= before + 1
    assert f"between steps {hole[0]} and {hole[1]} checkpoints are missing" in (tmp_path / "second.log").read_text()
