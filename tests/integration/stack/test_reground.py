"""Re-grounding on the demo's GRPO trainer, shown by a real Prefect server."""

import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from transformers import AutoModelForCausalLM

from deploy.local import daemon, stack
from deploy.local.stack import Stack
from evaluation.benchmarks.benchmark import write_benchmark
from flows.demo.task import DIGITS, problems
from relex.output import manifest
from tests.helpers import ROOT
from tests.helpers.api import call
from tests.helpers.processes import children_of, environment_of
from tests.helpers.stacks import auth
from tests.helpers.waiting import wait_for
from tests.integration.stack.conftest import TrainedRun

REAL, JUMP = 6, 30


@pytest.mark.slow
def test_grpo_goes_on_from_a_jump_that_was_judged(
    tmp_path: Path, trained: TrainedRun, servers: Stack, server_environment: dict[str, str]
) -> None:
    write_benchmark(tmp_path, "sort", problems("selection", 300), max_new_tokens=DIGITS + 1)
    content = {
        "training_run": "regrounded",
        "base": str(trained.base),
        "command": f"{sys.executable} -m flows.demo.trainer --base {{base}} --out {{out}} --steps {{steps}}"
        " --save-steps 2 --seed 1{cycle}",
        "directory": str(ROOT),
        "real_steps": REAL,
        "jump_steps": JUMP,
        "method": "relex",
        "selection": "sort.yaml",
        "total_steps": REAL + JUMP + REAL,
        "batch_size": 100,
        "memory": "64MiB",
    }
    config = tmp_path / "reground.yaml"
    config.write_text(yaml.safe_dump(content))
    argv = [
        sys.executable,
        "-m",
        "flows.cli",
        "reground",
        str(config),
        "--stack",
        "--home",
        str(servers.home),
        "--json",
    ]
    done = subprocess.run(argv, env=server_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    first, second = printed["cycles"]
    assert first["jumped_accuracy"] > printed["start"]["accuracy"]
    assert (first["jumped_steps"], second["jumped_steps"]) == (JUMP, 0)
    assert second["base"] == first["model"]
    assert (printed["step"], printed["real_steps"]) == (REAL + JUMP + REAL, 2 * REAL)
    # The second cycle is real GRPO from the jump: other weights, and a model that loads.
    assert manifest.verify(Path(printed["model"])).base == first["model"]
    AutoModelForCausalLM.from_pretrained(printed["model"])
    api = servers.prefect_api_url
    artifacts = call("POST", f"{api}/artifacts/filter", {"limit": 200}, auth=auth(servers))
    pages = [artifact["data"] for artifact in artifacts if artifact["key"] == "reground-regrounded-cycles"]
    assert any("Cycle 1: The jump is kept" in page for page in pages)
    runs = call("POST", f"{api}/task_runs/filter", {"limit": 200}, auth=auth(servers))
    assert {"train cycle 1", "jump cycle 1", "judge cycle 2"} <= {run["name"] for run in runs}


@pytest.mark.slow
def test_what_relex_up_serves_climbs_a_ladder_and_shows_its_cycles_on_a_page_and_in_mlflow(
    tmp_path: Path, trained: TrainedRun, servers: Stack, server_environment: dict[str, str]
) -> None:
    write_benchmark(tmp_path, "sort", problems("selection", 200), max_new_tokens=DIGITS + 1)
    content = {
        "training_run": "served-cycles",
        "base": str(trained.base),
        "command": f"{sys.executable} -m flows.demo.trainer --base {{base}} --out {{out}} --steps {{steps}}"
        " --save-steps 2 --seed 1{cycle}",
        "directory": str(ROOT),
        "real_steps": REAL,
        "selection": "sort.yaml",
        "total_steps": 24,
        "batch_size": 100,
        "memory": "64MiB",
    }
    config = tmp_path / "reground.yaml"
    config.write_text(yaml.safe_dump(content))
    home = tmp_path / ".relex/served-cycles/reground"
    argv = [sys.executable, "-m", "flows.deployments", str(config), "--tracking-uri", servers.mlflow_url]
    argv += ["--schedule-seconds", "20"]
    service = stack.spawn(servers.home, "watcher-served-cycles", argv, environment=server_environment)
    assert service.pid is not None
    try:
        # Its flow dies on the ladder, and the next run of the schedule takes it up.
        wait_for("a rung", lambda: next(home.glob("cycles/0001/models/secant/step-*"), None), seconds=480)
        for process in children_of(psutil.Process(service.pid)):
            if "PREFECT__FLOW_RUN_ID" in environment_of(process):
                process.kill()
                break
        wait_for("its end", lambda: "is the total" in (home / "reground.json").read_text() or None, seconds=480)
    finally:
        daemon.stop(servers.home, [service.name])
    printed = json.loads((home / "reground.json").read_text())
    cycle = printed["cycles"][0]
    assert len(cycle["ladder"]) >= 2
    api = servers.prefect_api_url
    asked = {"artifacts": {"key": {"any_": ["reground-served-cycles-cycles"]}}}
    pages = [artifact["data"] for artifact in call("POST", f"{api}/artifacts/filter", asked, auth=auth(servers))]
    assert any("Ladder of secant" in page for page in pages)
    client = MlflowClient(servers.mlflow_url)
    experiment = client.get_experiment_by_name("served-cycles")
    assert experiment is not None
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert runs["cycle 1"].data.metrics["jumped_steps"] == cycle["jumped_steps"]
