"""Re-grounding on the demo's GRPO trainer, shown by a real Prefect server."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from deploy.local.stack import Stack
from evaluation.benchmarks.benchmark import write_benchmark
from flows.demo.task import DIGITS, problems
from relex.output import manifest
from tests.helpers import ROOT
from tests.helpers.api import call
from tests.helpers.stacks import auth
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
    found = json.loads(done.stdout)
    first, second = found["cycles"]
    assert first["jumped_accuracy"] > found["start"]["accuracy"]
    assert (first["jumped_steps"], second["jumped_steps"]) == (JUMP, 0)
    assert second["base"] == first["model"]
    assert (found["step"], found["real_steps"]) == (REAL + JUMP + REAL, 2 * REAL)
    # The second cycle is real GRPO from the jump: other weights, and a model that loads.
    assert manifest.verify(Path(found["model"])).base == first["model"]
    AutoModelForCausalLM.from_pretrained(found["model"])
    api = servers.prefect_api_url
    artifacts = call("POST", f"{api}/artifacts/filter", {"limit": 200}, auth=auth(servers))
    pages = [item["data"] for item in artifacts if item["key"] == "reground-regrounded-cycles"]
    assert any("Cycle 1: The jump is kept" in page for page in pages)
    runs = call("POST", f"{api}/task_runs/filter", {"limit": 200}, auth=auth(servers))
    assert {"train cycle 1", "jump cycle 1", "judge cycle 2"} <= {run["name"] for run in runs}
