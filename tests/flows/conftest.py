"""A tiny checkpoint store and the settings that watch it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from flows.settings import Settings, load_settings

WriteCheckpoint = Callable[[int], Path]


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    """Write a complete checkpoint-N of a straight trajectory; step 0 is the base."""

    def write(step: int) -> Path:
        path = tmp_path / ("base" if step == 0 else f"run/checkpoint-{step}")
        path.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        start, slope = (torch.randn(8, 6, generator=generator) for _ in range(2))
        save_file({"weight": start + step * 1e-2 * slope}, path / "model.safetensors")
        (path / "config.json").write_text("{}")
        if step:
            (path / "trainer_state.json").write_text("{}")
        return path

    return write


@pytest.fixture
def config(tmp_path: Path) -> Path:
    content = {
        "training_run": "tiny",
        "checkpoints": "run",
        "base": "base",
        "window": 40,
        "targets": [200, 100],
        "selection": "selection.yaml",
        "gate": "gate.yaml",
        "registered_model": "tiny",
    }
    path = tmp_path / "relex.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def settings(config: Path) -> Settings:
    return load_settings(config)


def make_old(path: Path) -> None:
    """Let a directory look as if nothing had changed in it for a while."""
    then = time.time() - 600
    for item in (*path.iterdir(), path):
        os.utime(item, (then, then))
