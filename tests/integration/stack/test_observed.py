"""Real checkpoints of a real run on a real stack: scored as they appear, one more to beat, and registered."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deploy import registry
from deploy.local.stack import Stack
from flows.settings import load_settings
from flows.state.scored import read_scored
from flows.state.windows import read_decisions
from tests.integration.stack.conftest import STEPS, TrainedRun, write_config
from tests.integration.stack.test_pipeline import decide_now

WINDOW = 12

DRIFT = """
import sys
from flows.drift.flow import drift
drift(config=sys.argv[1], tracking_uri=sys.argv[2], step=0)
"""


@pytest.mark.slow
def test_observed_checkpoints_are_scored_beaten_and_registered(
    tmp_path: Path, trained: TrainedRun, servers: Stack, server_environment: dict[str, str]
) -> None:
    changes = {"window": WINDOW, "score_every": WINDOW}
    config = write_config(tmp_path, trained, name="observed", targets=[150], changes=changes)
    settings = load_settings(config)
    shutil.copytree(trained.checkpoints, settings.checkpoints)

    def run(*argv: str) -> str:
        done = subprocess.run(
            [sys.executable, *argv], env=server_environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    log = run("-c", DRIFT, str(config), servers.mlflow_url)
    scores = {row.step: row.score.accuracy for row in read_scored(settings) if row.score is not None}
    assert scores.keys() == {WINDOW, STEPS}
    assert f"step {STEPS} {scores[STEPS]:.4f}" in log
    client = MlflowClient(servers.mlflow_url)
    experiment = client.get_experiment_by_name("observed")
    assert experiment is not None
    (series,) = client.search_runs([experiment.experiment_id], "tags.`relex.key` LIKE 'series %'")
    points = {each.step: each.value for each in client.get_metric_history(series.info.run_id, "selection_accuracy")}
    assert points == scores
    best = client.get_model_version_by_alias("observed-observed", "best-observed")
    assert best.tags["step"] == str(max(scores, key=lambda step: scores[step]))
    # The run has learned something between the two.
    assert scores[STEPS] > scores[WINDOW]
    decide_now(config, servers, server_environment)
    (decision,) = read_decisions(settings)
    assert [gate.reference for gate in decision.gates] == [f"last observed @ {WINDOW}", f"best observed @ {STEPS}"]
    run("-m", "flows.cli", "register", f"{settings.checkpoints}/checkpoint-{STEPS}", "--config", str(config), "--home",
        str(servers.home))  # fmt: skip
    newest = registry.models("observed", tracking_uri=servers.mlflow_url)[0]
    assert (newest.target_step, newest.tags["method"]) == (STEPS, "observed")
    assert newest.metrics["gate_last_observed_lower_bound"] > 0
    assert f"last observed @ {WINDOW} by +" in newest.tags["beat"]
