"""A tiny checkpoint store whose weights move along a line, and the settings that watch it."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

WriteCheckpoint = Callable[[int], Path]


def write_checkpoint(root: Path, step: int) -> Path:
    """Write a complete ROOT/run/checkpoint-N of a straight trajectory; step 0 is ROOT/base."""
    path = root / ("base" if step == 0 else f"run/checkpoint-{step}")
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    start, slope = (torch.randn(8, 6, generator=generator) for _ in range(2))
    save_file({"weight": start + step * 1e-2 * slope}, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    if step:
        (path / "trainer_state.json").write_text("{}")
    return path


def write_config(root: Path) -> Path:
    """Write a ROOT/relex.yaml that watches ROOT/run."""
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
    path = root / "relex.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def make_old(path: Path) -> None:
    """Let a directory look as if nothing had changed in it for a while."""
    then = time.time() - 600
    for entry in (*path.iterdir(), path):
        os.utime(entry, (then, then))
