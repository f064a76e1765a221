"""Small training runs on disk: real safetensors files that have been quiet for a minute.

The steps are irregular, since with 1, 2, 3 the classic mistakes about the step axis cannot be seen.
"""

import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from relex import gram, store
from relex.errors import MemoryBudgetError
from relex.forecast import Forecast, forecast
from relex.gram import Gram
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE
from relex.output.materialise import Output, materialise
from relex.predictors import parse_method
from relex.trajectory import Trajectory, open_trajectory

State = Mapping[str, Tensor]

MIB = 1 << 20
STEPS = (10, 20, 25, 40, 75)
TARGET = 200

# A little of everything a model file may hold. mlp is longer than a chunk and no multiple of one.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (23, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.mlp.weight": (257, 301),
    "model.layers.0.q_proj.bias": (8,),
    "lm_head.weight": (23, 8),
    "frozen.weight": (16, 5),
    "scale": (),
}
FROZEN = "frozen.weight"
NORM = "model.layers.0.input_layernorm.weight"


@dataclass(frozen=True)
class Run:
    """Where a base and its training run lie."""

    base: Path
    run: Path

    def open(self, *, window: int | None = None) -> Trajectory:
        base = store.open_base(self.base)
        stored = store.scan(self.run, base, now=time.time())
        return open_trajectory(base, store.observed(stored, self.run, window=window))


def drift(
    shapes: Mapping[str, tuple[int, ...]] = SHAPES,
    *,
    steps: Sequence[int] = STEPS,
    base: torch.dtype = torch.bfloat16,
    stored: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> dict[int, dict[str, Tensor]]:
    """Return the state at step 0 (the base) and at every step; an integer and a boolean buffer are among the tensors.

    The deltas are sum_i sigma_i a_i(step) v_i with orthonormal a_i, the first along the step, and sigma halving: a gap
    of 4 between neighbouring eigenvalues of the Gram, far above the rounding of bf16. So every rank is well-posed.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(steps)
    columns = torch.randn(count, count, generator=generator, dtype=torch.float64)
    columns[:, 0] = torch.tensor(steps, dtype=torch.float64)
    along_KK, _ = torch.linalg.qr(columns)
    states: dict[int, dict[str, Tensor]] = {step: {} for step in (0, *steps)}
    for name, shape in shapes.items():
        origin = torch.randn(shape, generator=generator, dtype=torch.float64).to(base)
        directions = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
        sigma_K = 0.5 ** torch.arange(count, dtype=torch.float64) * (0.0 if name == FROZEN else 1.0)
        deltas = torch.tensordot(along_KK * sigma_K, directions, dims=1)
        states[0][name] = origin
        for step, delta in zip(steps, deltas, strict=True):
            states[step][name] = (origin.to(torch.float64) + delta).to(stored)
    for step, state in states.items():
        state["position_ids"] = torch.arange(5) + step
        state["mask"] = torch.tensor([True, False, step > 20])
    return states


def write_model(path: Path, state: State, *, shards: int = 1, config: Mapping[str, Any] | None = None) -> Path:
    """Write `state` as one model.safetensors, or dealt out to shards with an index."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config or {"model_type": "qwen2"}))
    if shards == 1:
        save_file(dict(state), path / SINGLE_FILE, metadata={"format": "pt"})
        return quiet(path)
    names = sorted(state)
    weight_map = {name: f"model-{i % shards + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        inside = {name: state[name] for name in names if weight_map[name] == shard}
        save_file(inside, path / shard, metadata={"format": "pt"})
    (path / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return quiet(path)


def quiet(path: Path, *, seconds: float = 60.0) -> Path:
    """Say of a directory and of everything in it that it last changed `seconds` ago."""
    then = time.time() - seconds
    for file in (*path.iterdir(), path):
        os.utime(file, (then, then))
    return path


def write_run(
    root: Path,
    states: Mapping[int, State],
    *,
    base_shards: int = 1,
    shards: int = 1,
    config: Mapping[str, Any] | None = None,
) -> Run:
    """Write root/base from the state at step 0 and root/run/checkpoint-N from every other."""
    run = Run(root / "base", root / "run")
    write_model(run.base, states[0], shards=base_shards, config=config)
    run.run.mkdir(exist_ok=True)
    for step, state in states.items():
        if step:
            write_model(run.run / f"checkpoint-{step}", state, shards=shards, config=config)
    return run


def measure(trajectory: Trajectory) -> Gram:
    """Take the Gram with room to spare."""
    return gram.measure(trajectory, memory=64 * MIB, threads=2)


def predict(trajectory: Trajectory, method: str = "relex", *, target: int = TARGET) -> Forecast:
    """Forecast from a Gram that was just measured."""
    return forecast(trajectory, measure(trajectory), parse_method(method), target_step=target)


def least_memory(trajectory: Trajectory) -> int:
    """Return the budget in bytes that the refusal of a smaller one names."""
    with pytest.raises(MemoryBudgetError) as caught:
        gram.measure(trajectory, memory=1, threads=1)
    match = re.fullmatch(r".*Give at least (\d+)MiB\.", str(caught.value))
    assert match is not None, caught.value
    return int(match[1]) * MIB


def write(trajectory: Trajectory, prediction: Forecast, out: Path) -> Path:
    """Materialise one forecast with room to spare."""
    materialise(trajectory, [Output(prediction, out)], memory=64 * MIB, threads=2)
    return out


def load(path: Path) -> dict[str, Tensor]:
    """Read a model directory with safetensors' own reader."""
    return {name: tensor for file in sorted(path.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def content(path: Path) -> dict[str, bytes]:
    """Return every file of a directory by name, but for the manifest, which names the directories it came from."""
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name != "relex.json"}


def tree(root: Path) -> set[str]:
    """Return everything under `root`, hidden things too."""
    return {str(path.relative_to(root)) for path in root.rglob("*")}
