"""Nothing is announced, decided or recorded twice, and nothing is lost, whoever is killed at whatever moment.

RELEX_KILL_ROUNDS rounds (2 by default): in each, two training runs under one server start anew and fill their windows,
and one of the processes is killed with SIGKILL in the middle. What is decided costs no model: four checkpoints are too
few for the backtest, so it says hold. The servers ask for a password, and afterwards it is nowhere to be read.
"""

import base64
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from mlflow import MlflowClient
from safetensors.torch import save_file

from deploy.local import daemon, stack
from deploy.local.stack import Stack
from evaluation.benchmarks.benchmark import write_benchmark
from flows.settings import Settings, load_settings
from flows.state.events import CHECKPOINT_READY, WINDOW_READY, resource
from flows.state.windows import read_decisions
from tests.helpers.api import call
from tests.helpers.processes import command_of, environment_of
from tests.helpers.stacks import environment_given_back
from tests.helpers.waiting import wait_for

ROUNDS = int(os.environ.get("RELEX_KILL_ROUNDS", "2"))
SEED = int(os.environ.get("RELEX_KILL_SEED", "0"))
VICTIMS = ("prefect", "serving", "decide", "watch")
STEPS = (10, 20, 25, 40)
NAMES = ("left", "right")
ACCESS = ("somebody", "no-one-may-read-this")


@dataclass(frozen=True)
class Run:
    """One training run: where its config lies, and what it says."""

    config: Path
    settings: Settings

    @property
    def name(self) -> str:
        return self.settings.training_run

    def start_anew(self) -> None:
        """Move away what an earlier run wrote."""
        place = Path(self.settings.checkpoints)
        if place.exists():
            shutil.rmtree(place.rename(place.with_name("former")))
        place.mkdir()

    def save(self, step: int, *, seed: int) -> None:
        path = Path(self.settings.checkpoints) / f"checkpoint-{step}"
        path.mkdir()
        _write_weights(path, step, seed=seed)
        (path / "trainer_state.json").write_text("{}")


def _write_weights(path: Path, step: int, *, seed: int) -> None:
    start, slope = (torch.randn(8, 6, generator=torch.Generator().manual_seed(each)) for each in (0, seed))
    save_file({"weight": start + step * 1e-2 * slope}, path / "model.safetensors")
    (path / "config.json").write_text("{}")


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    for split in ("selection", "gate"):
        problems = [{"prompt": f"{split} {n} =", "answer": str(n)} for n in range(8)]
        write_benchmark(tmp_path, split, problems, max_new_tokens=2)
    (tmp_path / "base").mkdir()
    _write_weights(tmp_path / "base", 0, seed=1)
    collected = []
    for name in NAMES:
        content = {
            "training_run": name,
            "checkpoints": f"{name}-run",
            "base": "base",
            "window": STEPS[-1],
            "targets": "auto",
            # Untrained, it answers nothing rightly, and no rung is worse than another.
            "total_steps": 80,
            "selection": "selection.yaml",
            "gate": "gate.yaml",
            "registered_model": "shared",
            "state": f"{name}-state",
            "threads": 1,
            "poll_seconds": 0.5,
        }
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump(content))
        collected.append(Run(config, load_settings(config)))
    return collected


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A home of its own, since its server is killed, with a password."""
    home = tmp_path / "home"
    home.mkdir()
    home.joinpath("auth").write_text(":".join(ACCESS))
    home.joinpath("auth").chmod(0o600)
    with environment_given_back():
        yield home
        stack.down(home)


def _up(home: Path, runs: list[Run]) -> Stack:
    """Do what `relex up CONFIG …` does, with watchers that look for 60 s every 62 s."""
    running = stack.up(home)
    for run in runs:
        argv = [sys.executable, "-m", "flows.deployments", str(run.config), "--tracking-uri", running.mlflow_url]
        argv += ["--run-seconds", "60", "--schedule-seconds", "62"]
        environment = {**stack.environment(running), "OMP_NUM_THREADS": "1"}
        stack.spawn(home, f"watcher-{run.name}", argv, environment=environment)
    return running


def _post(running: Stack, path: str, body: dict[str, Any]) -> Any:
    return call("POST", f"{running.prefect_api_url}/{path}", body, auth=ACCESS)


def _events(running: Stack, run: Run, name: str) -> list[dict[str, Any]]:
    body = {"filter": {"event": {"name": [name]}, "resource": {"id": [resource(run.settings)]}}, "limit": 50}
    page = _post(running, "events/filter", body)
    events: list[dict[str, Any]] = page["events"]
    while page["next_page"]:
        page = call("GET", page["next_page"], auth=ACCESS)
        events += page["events"]
    return events


def _flow_runs(running: Stack) -> list[dict[str, Any]]:
    collected: list[dict[str, Any]] = []
    while page := _post(running, "flow_runs/filter", {"limit": 200, "offset": len(collected)}):
        collected += page
    return collected


def _leader(home: Path, name: str) -> psutil.Process | None:
    service = daemon.find(home, name)
    return None if service is None or service.pid is None else psutil.Process(service.pid)


def _flow_process(home: Path, run: Run, flow: str) -> psutil.Process | None:
    """Return the process of this training run's running flow run `flow`."""
    running = stack.running(home)
    flows = {each["id"]: each["name"] for each in _post(running, "flows/filter", {})}
    names = {each["id"]: flows[each["flow_id"]] for each in _flow_runs(running) if each["state_type"] == "RUNNING"}
    for process in daemon.processes(home, f"watcher-{run.name}"):
        engine = "prefect" in " ".join(command_of(process))
        flow_run = environment_of(process).get("PREFECT__FLOW_RUN_ID", "") if engine else ""
        if names.get(flow_run) == flow:
            return process
    return None


def _kill(home: Path, run: Run, victim: str, *, delay: float, done: Callable[[], bool]) -> str:
    """Kill one process after `delay` seconds; for a flow, once it is there. Says what was killed."""
    find: dict[str, Callable[[], psutil.Process | None]] = {
        "prefect": lambda: _leader(home, "prefect"),
        "serving": lambda: _leader(home, f"watcher-{run.name}"),
    }
    look = find.get(victim, lambda: _flow_process(home, run, victim))
    if victim not in find:
        wait_for(f"the flow {victim} of {run.name}", lambda: done() or look())
    time.sleep(delay)
    process = look()
    if process is None:
        return f"nothing ({victim} had ended)"
    process.send_signal(signal.SIGKILL)
    return f"{victim} {process.pid}"


@pytest.mark.slow
def test_nothing_is_lost_or_doubled_whatever_is_killed(
    place: Path, runs: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    random_ = random.Random(SEED)
    victims = [VICTIMS[index % len(VICTIMS)] for index in range(ROUNDS)]
    random_.shuffle(victims)
    _up(place, runs)
    written: dict[Path, int] = {}
    for index, victim in enumerate(victims):
        began = time.monotonic()
        for run in runs:
            run.start_anew()
        killed_run, delay = random_.choice(runs), random_.uniform(0, 3)
        # Before, between or after the checkpoints of this round.
        moment = random_.randrange(len(STEPS) + 1)

        def decided(run: Run, index: int = index) -> bool:
            return len(read_decisions(run.settings)) > index

        told = ""
        for position, step in enumerate((*STEPS, None)):
            if position == moment and victim != "decide":
                told = _kill(place, killed_run, victim, delay=delay, done=lambda: decided(killed_run))  # noqa: B023
            if step is not None:
                for run in runs:
                    run.save(step, seed=2 + index)
                time.sleep(random_.uniform(0, 1))
        if victim == "decide":
            told = _kill(place, killed_run, victim, delay=delay, done=lambda: decided(killed_run))  # noqa: B023
        time.sleep(random_.uniform(0, 2))
        running = _up(place, runs)
        for run in runs:
            wait_for(f"round {index}: the decision of {run.name}", lambda: decided(run) or None, seconds=400)  # noqa: B023
        with capsys.disabled():
            sys.stdout.write(
                f"\nround {index}: {killed_run.name}, {told} before checkpoint {moment} + {delay:.1f} s;"
                f" {time.monotonic() - began:.0f} s"
            )
        written |= {path: path.stat().st_mtime_ns for path in _decision_files(runs)}
        assert len(written) == (index + 1) * len(runs)

    for run in runs:
        # As many as were written, each once, and each with its own content.
        expected = Counter(dict.fromkeys(STEPS, ROUNDS))
        wait_for(
            f"every checkpoint event of {run.name}",
            lambda: len(_events(running, run, CHECKPOINT_READY)) >= expected.total() or None,  # noqa: B023
            seconds=240,
        )
        assert Counter(event["payload"]["step"] for event in _events(running, run, CHECKPOINT_READY)) == expected
        decisions = read_decisions(run.settings)
        assert [decision.steps for decision in decisions] == [STEPS] * ROUNDS
        keys = {event["payload"]["key"] for event in _events(running, run, WINDOW_READY)}
        assert keys == {decision.key for decision in decisions}
        verdicts = Counter(
            each["parameters"]["key"]
            for each in _flow_runs(running)
            if each["state_type"] == "COMPLETED" and (each["state"]["message"] or "").startswith("keep training")
        )
        assert all(verdicts[decision.key] <= 1 for decision in decisions)
        failed = [each for each in _flow_runs(running) if each["state_type"] == "FAILED"]
        assert [each["state"]["message"] for each in failed] == []
    # No decision was made again over one that stood.
    assert {path: path.stat().st_mtime_ns for path in _decision_files(runs)} == written
    client = MlflowClient(running.mlflow_url)
    experiment = client.get_experiment_by_name("shared")
    assert experiment is not None
    recorded = Counter(run.data.tags["relex.key"] for run in client.search_runs([experiment.experiment_id]))
    assert recorded == Counter(f"{run.name} {each.key}" for run in runs for each in read_decisions(run.settings))
    _refuse_secrets(place, running)


@pytest.mark.slow
def test_a_watcher_that_starts_while_the_server_is_away_serves_when_it_is_back(place: Path, runs: list[Run]) -> None:
    stack.up(place)
    server = _leader(place, "prefect")
    assert server is not None
    running = stack.running(place)
    server.kill()
    run = runs[0]
    run.start_anew()
    argv = [sys.executable, "-m", "flows.deployments", str(run.config), "--tracking-uri", running.mlflow_url]
    watcher = stack.spawn(
        place, "watcher-left", argv, environment={**stack.environment(running), "OMP_NUM_THREADS": "1"}
    )
    said = f"waiting for the Prefect server at {running.prefect_api_url}: "
    wait_for("what it waits for", lambda: said in watcher.log.read_text())
    assert stack.up(place).prefect_api_url == running.prefect_api_url
    wait_for(
        "a run of its watcher",
        lambda: [each for each in _flow_runs(running) if each["state_type"] == "RUNNING"],
    )


def _refuse_secrets(home: Path, running: Stack) -> None:
    """Fail where the password is to be read: files, command lines, what the server tells of deployments and runs."""
    plain = ACCESS[1].encode()
    secrets = (plain, base64.b64encode(":".join(ACCESS).encode()))
    files = [path for path in home.parent.rglob("*") if path.is_file() and path != home / "auth"]
    assert len(files) > 50
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in secrets if secret in content], path
    processes = [process for service in stack.status(home) for process in daemon.processes(home, service.name)]
    told = [" ".join(command_of(process)) for process in processes]
    told += [str(_post(running, path, {})) for path in ("deployments/filter", "flow_runs/filter", "artifacts/filter")]
    told += [str(service) for service in stack.status(home)]
    assert not [text for text in told if plain.decode() in text]


def _decision_files(runs: list[Run]) -> list[Path]:
    return [path for run in runs for path in run.settings.home.glob("windows/*/decision.json")]
