"""A relex.yaml that is edited while a window is being decided changes nothing about that window."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from deploy import registry
from deploy.local.stack import Stack
from evaluation.benchmarks.benchmark import write_benchmark
from flows.settings import load_settings
from flows.state.windows import read_decisions, window_key
from relex.store import open_base, scan
from tests.evaluation.conftest import write_model
from tests.helpers.straight_run import make_old
from tests.helpers.waiting import wait_for

DECIDE = """
import sys
from pathlib import Path
from flows.decide.flow import decide
config, key, tracking_uri = sys.argv[1:]
decide(config=config, steps=[10, 25], key=key, tracking_uri=tracking_uri)
"""


def evaluating(home: Path) -> bool:
    """Return whether an evaluation on the selection has begun."""
    return any(home.glob("evaluations/selection-*"))


@pytest.mark.slow
def test_a_margin_that_is_edited_while_candidates_are_scored_does_not_change_the_gate(
    tmp_path: Path, servers: Stack, server_environment: dict[str, str]
) -> None:
    base = write_model(tmp_path / "base", seed=0)
    origin = load_file(base / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    slope = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in origin.items()}
    for step in (10, 25):
        path = tmp_path / "run" / f"checkpoint-{step}"
        path.mkdir(parents=True)
        moved = {name: tensor + 2e-3 * step * slope[name] for name, tensor in origin.items()}
        save_file(moved, path / "model.safetensors")
        path.joinpath("trainer_state.json").write_text("{}")
        make_old(path)
    for name, first in {"selection": 0, "gate": 100, "easy": 200}.items():
        rows = [{"prompt": f"{number}+1=", "answer": str(number + 1)} for number in range(first, first + 12)]
        write_benchmark(tmp_path, name, rows, max_new_tokens=3)
    content = {"training_run": "edited", "checkpoints": "run", "base": "base", "window": 25, "targets": [100]}
    # Twelve problems on which nothing is known to be within 0.05.
    content |= {"selection": "selection.yaml", "gate": "gate.yaml", "margin": 0.05, "registered_model": "edited"}
    config = tmp_path / "relex.yaml"
    config.write_text(yaml.safe_dump(content))
    settings = load_settings(config)
    weights = open_base(settings.base)
    key = window_key(settings, weights, list(scan(settings.checkpoints, weights, now=time.time())))

    with subprocess.Popen(
        [sys.executable, "-c", DECIDE, str(config), key, servers.mlflow_url],
        env=server_environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as deciding:
        try:
            wait_for("an evaluation on the selection", lambda: evaluating(settings.home) or deciding.poll() is not None)
            # The candidate is not scored yet; against these nearly everything passes.
            config.write_text(yaml.safe_dump(content | {"margin": 0.9, "confidence": 0.6, "gate": "easy.yaml"}))
            _, log = deciding.communicate()
        finally:
            deciding.kill()
    assert deciding.returncode == 0, log

    (decision,) = read_decisions(settings)
    (gate,) = decision.gates
    assert (gate.benchmark, gate.margin, gate.confidence) == ("gate", 0.05, 0.95)
    assert decision.verdict == "keep training"
    assert registry.models("edited", tracking_uri=servers.mlflow_url) == []
