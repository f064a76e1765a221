"""Runs as verl's FSDP checkpoint manager saves them: DTensors of a few ranks, one after the other in this process."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.helpers.trajectories import Run, State, quiet, write_model


def rank_file(rank: int, *, world: int = 2) -> str:
    return f"model_world_size_{world}_rank_{rank}.pt"


def write_run(
    root: Path, states: Mapping[int, State], *, world: int = 2, config: Mapping[str, Any] | None = None
) -> Run:
    """Write root/base from the state at step 0 and root/run/global_step_N/actor from every other, quiet."""
    run = Run(root / "base", root / "run")
    write_model(run.base, states[0], config=config)
    run.run.mkdir(exist_ok=True)
    steps = [step for step in states if step]
    for step in steps:
        write_settings(run.run / f"global_step_{step}" / "actor", world=world, config=config)
    for rank in range(world):
        with rank_of(rank, world=world) as mesh:
            for step in steps:
                write_rank(run.run / f"global_step_{step}" / "actor", states[step], mesh)
    for step in steps:
        quiet_step(run.run / f"global_step_{step}")
    (run.run / "latest_checkpointed_iteration.txt").write_text(str(max(steps)))
    # Its step directories are among what is made quiet, no older than what is in them.
    quiet(run.run)
    return run


@contextmanager
def rank_of(rank: int, *, world: int) -> Iterator[DeviceMesh]:
    """Be one rank of a group that never communicates."""
    hook = sys.excepthook
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,), mesh_dim_names=("fsdp",))
    finally:
        dist.destroy_process_group()
        # torch adds the rank to every later message of the interpreter.
        sys.excepthook = hook


def write_rank(actor: Path, state: State, mesh: DeviceMesh) -> Path:
    """Save what one rank holds: floats split along their rows, everything else whole."""
    file = actor / rank_file(mesh.get_rank(), world=mesh.size())
    torch.save({name: _held(tensor, mesh) for name, tensor in state.items()}, file)
    return file


def write_settings(actor: Path, *, world: int, config: Mapping[str, Any] | None = None) -> None:
    """Write what verl's rank 0 puts beside the weights."""
    (actor / "huggingface").mkdir(parents=True)
    (actor / "huggingface" / "config.json").write_text(json.dumps(config or {"model_type": "qwen2"}))
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": world}, indent=4))


def quiet_step(step: Path) -> None:
    """Say of everything in a step directory that it last changed a minute ago."""
    for directory in (step / "actor" / "huggingface", step / "actor", step):
        quiet(directory)


def _held(tensor: Tensor, mesh: DeviceMesh) -> Tensor:
    if isinstance(tensor, DTensor) or tensor.dim() == 0 or not tensor.is_floating_point():
        return tensor
    chunk = -(-len(tensor) // mesh.size())
    rows = tensor[chunk * mesh.get_rank() : chunk * (mesh.get_rank() + 1)].clone()
    whole = tensor.contiguous()
    return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
