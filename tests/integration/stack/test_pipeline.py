"""The whole pipeline on a real RLVR run with real servers, and what is left of it when its processes are killed."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from deploy import registry
from deploy.local import daemon, stack
from deploy.local.stack import Stack
from flows.promote.promotion import promote
from flows.settings import load_settings
from flows.state.ledger import read_ledger
from flows.state.windows import read_decisions
from relex.files.local import LocalDirectory
from relex.layouts.steps import step_directories
from relex.output import manifest
from tests.helpers.api import call
from tests.helpers.processes import command_of, environment_of, kill_with_children
from tests.helpers.stacks import auth
from tests.helpers.waiting import wait_for
from tests.integration.stack.conftest import STEPS, TrainedRun, write_config


def descendants(pid: int, *words: str) -> list[psutil.Process]:
    """Return the live processes below `pid` whose command line holds all of `words`."""
    return [
        process
        for process in psutil.Process(pid).children(recursive=True)
        if all(word in " ".join(command_of(process)) for word in words)
    ]


def flow_process(pid: int, environment_word: str, names: dict[str, str]) -> psutil.Process | None:
    """Return the process of a flow run whose name, by its id, contains `environment_word`."""
    for process in psutil.Process(pid).children(recursive=True):
        run = environment_of(process).get("PREFECT__FLOW_RUN_ID")
        if run and "prefect" in " ".join(command_of(process)) and environment_word in names.get(run, ""):
            return process
    return None


def flow_runs(servers: Stack) -> list[dict[str, str]]:
    """Return id, flow name and state of every flow run."""
    flows = call("POST", f"{servers.prefect_api_url}/flows/filter", {}, auth=auth(servers))
    names = {flow["id"]: flow["name"] for flow in flows}
    runs = call("POST", f"{servers.prefect_api_url}/flow_runs/filter", {"limit": 200}, auth=auth(servers))
    return [
        {
            "id": run["id"],
            "flow": names[run["flow_id"]],
            "state": run["state_type"],
            "config": run["parameters"].get("config", ""),
        }
        for run in runs
    ]


Serve = Callable[[Path, str], psutil.Process]


@pytest.fixture
def serve(servers: Stack, server_environment: dict[str, str]) -> Iterator[Serve]:
    """Serve the training run of a config; the watcher looks for 20 s every 25 s."""
    names: list[str] = []

    def start(config: Path, name: str) -> psutil.Process:
        argv = [sys.executable, "-m", "flows.deployments", str(config), "--tracking-uri", servers.mlflow_url]
        argv += ["--run-seconds", "20", "--schedule-seconds", "25"]
        service = stack.spawn(servers.home, name, argv, environment=server_environment)
        assert service.pid is not None
        names.append(name)
        return psutil.Process(service.pid)

    yield start
    # As `relex down` does: Prefect's runner, which raises SystemExit wherever it is on SIGTERM, may hang.
    daemon.stop(servers.home, names)


def _steps(trained: TrainedRun) -> dict[int, Path]:
    run = LocalDirectory(trained.checkpoints)
    return {step: trained.checkpoints / each.name for step, each in step_directories(run).items()}


def test_killing_watcher_flow_and_evaluation_ends_in_one_registered_version(
    tmp_path: Path, trained: TrainedRun, servers: Stack, serve: Serve
) -> None:
    config = write_config(tmp_path, trained, name="killed", targets=[150])
    settings = load_settings(config)
    served = serve(config, "killed").pid

    def running(flow: str) -> psutil.Process | None:
        names = {run["id"]: run["flow"] for run in flow_runs(servers)}
        return flow_process(served, flow, names)

    # The watcher sees all but the last checkpoint, and dies.
    for step, path in _steps(trained).items():
        if step < STEPS:
            shutil.copytree(path, Path(settings.checkpoints) / path.name)
    wait_for("the first checkpoints", lambda: read_ledger(settings).checkpoints or None)
    watcher = wait_for("the watcher", lambda: running("watch"))
    watcher.send_signal(signal.SIGKILL)
    watcher.wait(60)

    # The window fills while nobody looks; the next watcher finds it.
    last = _steps(trained)[STEPS]
    shutil.copytree(last, Path(settings.checkpoints) / last.name)
    child = wait_for("an evaluation", lambda: next(iter(descendants(served, "evaluation.answers.worker")), None))
    child.send_signal(signal.SIGKILL)
    # The next evaluation is the retry, or another model's: its flow dies under it.
    wait_for(
        "the next evaluation",
        lambda: next(
            (each for each in descendants(served, "evaluation.answers.worker") if each.pid != child.pid), None
        ),
    )
    flow = wait_for("the flow", lambda: running("decide"))
    flow.send_signal(signal.SIGKILL)
    assert read_decisions(settings) == []

    decision = wait_for("the decision", lambda: next(iter(read_decisions(settings)), None))
    assert decision.verdict == "registered", decision.reason
    versions = registry.models("killed", tracking_uri=servers.mlflow_url)
    assert [row.version for row in versions] == [1]
    assert len(read_ledger(settings).windows) == 1
    assert decision.winner is not None
    assert decision.winner.step == versions[0].target_step == 150

    # What was registered is the prediction, whole, and loads.
    weights = Path(versions[0].weights.removeprefix("file://"))
    assert AutoModelForCausalLM.from_pretrained(weights).num_parameters() > 0
    assert manifest.read(Path(decision.winner.directory)).digest == versions[0].digest
    # No answer was paid for twice.
    for journal in settings.home.glob("evaluations/*/journal.jsonl"):
        keys = [json.loads(line) for line in journal.read_text().splitlines()]
        assert len(keys) == len({json.dumps(key, sort_keys=True) for key in keys})

    # Both kills are on record.
    states = {(run["flow"], run["state"]) for run in flow_runs(servers)}
    assert {("watch", "CRASHED"), ("decide", "CRASHED"), ("decide", "COMPLETED")} <= states


def decide_now(config: Path, servers: Stack, environment: dict[str, str]) -> str:
    """Run the flow on the window that is due, twice, in a process of its own; return what it logged."""
    code = (
        "import sys, time; from pathlib import Path\n"
        "from flows.decide.flow import decide; from flows.watch.announce import full_window\n"
        "from flows.state.windows import window_key\n"
        "from flows.settings import load_settings; from relex.store import open_base, scan\n"
        "s = load_settings(Path(sys.argv[1])); base = open_base(s.base)\n"
        "stored = scan(s.checkpoints, base, now=time.time()); steps = full_window(stored, s.end)\n"
        "key = window_key(s, base, [one for one in stored if one.step in steps])\n"
        "decide(config=sys.argv[1], steps=steps, key=key, tracking_uri=sys.argv[2])\n"
        "decide(config=sys.argv[1], steps=steps, key=key, tracking_uri=sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(config), servers.mlflow_url],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_a_prediction_that_is_no_better_is_refused_with_its_numbers(
    tmp_path: Path, trained: TrainedRun, servers: Stack, server_environment: dict[str, str]
) -> None:
    # Two hundred times the window: far outside what the line can carry.
    config = write_config(tmp_path, trained, name="refused", targets=[5000])
    settings = load_settings(config)
    shutil.copytree(trained.checkpoints, settings.checkpoints)
    log = decide_now(config, servers, server_environment)
    (decision,) = read_decisions(settings)
    assert decision.verdict == "keep training"
    assert "No candidate is ahead" in decision.reason
    assert decision.gates == ()
    assert registry.models("refused", tracking_uri=servers.mlflow_url) == []
    # The refusal is on record, in MLflow and on a page of Prefect's.
    artifacts = call("POST", f"{servers.prefect_api_url}/artifacts/filter", {"limit": 200}, auth=auth(servers))
    assert any(artifact["key"] == "decision-refused" and "keep training" in artifact["data"] for artifact in artifacts)
    assert decision.record_url.startswith(servers.mlflow_url)
    # The second call found the decision and paid for nothing.
    assert "is decided" in log


@pytest.mark.slow
def test_window_targets_and_attempts_are_left_to_the_backtest(
    tmp_path: Path, trained: TrainedRun, servers: Stack, serve: Serve
) -> None:
    changes = {"window": "auto", "max_window": STEPS, "targets": "auto", "total_steps": 150, "attempts": 2}
    changes["batch_size"] = 200
    config = write_config(tmp_path, trained, name="automatic", targets=[], changes=changes)
    settings = load_settings(config)
    shutil.copytree(trained.checkpoints, settings.checkpoints)
    serve(config, "automatic")
    decision = wait_for("the decision", lambda: next(iter(read_decisions(settings)), None), seconds=480)
    assert decision.verdict == "registered", decision.reason
    assert decision.window <= STEPS
    assert decision.backtested is not None
    assert decision.backtested.state == "trusted", decision.backtested.reason
    # Every rung that was climbed was scored, and what fell off is gone from the disk.
    targets = {score.model.step for score in (*decision.selection, *decision.dropped)}
    assert {rung.step for rung in decision.ladder} == targets - {decision.window}
    assert max(targets) <= 150
    assert {rung.method for rung in decision.ladder} >= {"relex"}
    # The decision is recorded first: what a kill in between leaves is disk, not a decision made twice.
    fallen = [Path(score.model.directory) for score in decision.dropped]
    wait_for("what fell off the ladder to be removed", lambda: not any(path.exists() for path in fallen), seconds=60)
    assert decision.winner is not None
    assert Path(decision.winner.directory).is_dir()
    # Five hundredths, shared by two windows.
    assert [(gate.confidence, gate.comparisons) for gate in decision.gates] == [(0.95, 2)]
    asked = {"artifacts": {"key": {"any_": ["decision-automatic"]}}}
    (page,) = call("POST", f"{servers.prefect_api_url}/artifacts/filter", asked, auth=auth(servers))
    assert "Backtest" in page["data"]
    # In MLflow every candidate is a run below the decision's.
    client = MlflowClient(servers.mlflow_url)
    experiment = client.get_experiment_by_name("automatic")
    assert experiment is not None
    below = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`mlflow.parentRunId` = '{decision.record_url.rpartition('/')[2]}'",
    )
    assert {int(run.data.params["target_step"]) for run in below} == targets - {decision.window}
    assert all(run.data.params["digest"] and run.data.metrics["selection_problems"] >= 100 for run in below)


@pytest.mark.slow
def test_a_candidate_must_be_better_than_the_champion(
    tmp_path: Path, trained: TrainedRun, servers: Stack, server_environment: dict[str, str]
) -> None:
    decisions = []
    for target in (150, 60):
        directory = tmp_path / str(target)
        directory.mkdir()
        config = write_config(directory, trained, name="contested", targets=[target])
        shutil.copytree(trained.checkpoints, load_settings(config).checkpoints)
        decide_now(config, servers, server_environment)
        decisions += read_decisions(load_settings(config))
        if target == 150:
            promote("contested", 1, tracking_uri=servers.mlflow_url, by="ada", downloads=tmp_path / "downloads")
    first, second = decisions
    assert first.verdict == "registered"
    # Better than the last observed checkpoint, and still not better than what people use.
    assert [(gate.reference, gate.passed) for gate in second.gates] == [
        (f"last observed @ {STEPS}", True),
        ("champion @ 150", False),
    ]
    assert second.verdict == "keep training"
    assert "champion @ 150" in second.reason
    assert [row.target_step for row in registry.models("contested", tracking_uri=servers.mlflow_url)] == [150]


@pytest.mark.slow
def test_a_new_watcher_settles_what_a_killed_one_left_and_watches_its_own_run(
    tmp_path: Path, trained: TrainedRun, servers: Stack, serve: Serve
) -> None:
    def watching(config: Path, state: str) -> bool | None:
        runs = [run for run in flow_runs(servers) if run["flow"] == "watch" and run["config"] == str(config)]
        return any(run["state"] == state for run in runs) or None

    old, new = tmp_path / "old", tmp_path / "new"
    for directory in (old, new):
        directory.mkdir()
    first = write_config(old, trained, name="moved", targets=[150])
    killed = serve(first, "moved-old")
    wait_for("the first watcher", lambda: watching(first, "RUNNING"))
    kill_with_children(killed)
    killed.wait(60)
    # The same training run, its config in another place, as after moving the directory while the stack was down.
    second = write_config(new, trained, name="moved", targets=[150])
    shutil.copytree(trained.checkpoints, load_settings(second).checkpoints)
    serve(second, "moved-new")
    wait_for("the second watcher's ledger", lambda: read_ledger(load_settings(second)).windows or None)
    assert watching(first, "CRASHED")
    assert not watching(first, "RUNNING")
    assert not watching(first, "SCHEDULED")
