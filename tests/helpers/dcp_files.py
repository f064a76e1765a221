"""Runs of two ranks saved by torch's own writers of distributed checkpoints, without processes.

What a rank holds is said by the protocol that torch has for tensors of other libraries; plans, files and `.metadata`
come from the same calls as in `torch.distributed.checkpoint.save`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from tests.helpers.trajectories import Run, State, quiet, write_model

WORLD = 2
# Dimension along which a tensor is sharded; others along the first. None: the same on every rank, saved by one.
SHARDED = {"model.layers.0.self_attn.q_proj.weight": 1, "model.layers.0.input_layernorm.weight": None}

Writer = FileSystemWriter | HuggingFaceStorageWriter


class Shard(Tensor):
    """The part of a tensor that one rank holds, as torch's planner asks for it."""

    part: Tensor
    origin: tuple[int, ...]
    whole: torch.Size

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.part), self.whole)
        return [WriteItem(MetadataIndex(fqn, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(self.origin), self.part.size())]

    def __get_tensor_shard__(self, _: MetadataIndex) -> Tensor:
        return self.part


def save(state: Mapping[str, Any], writer: Writer, *, world: int = WORLD) -> None:
    """Save a state dict as `world` ranks do; tensors in it are sharded as SHARDED says, anything else is rank 0's."""
    planners = [DefaultSavePlanner() for _ in range(world)]
    for rank, planner in enumerate(planners):
        planner.set_up_planner(_held(state, rank, world), writer.storage_meta(), is_coordinator=rank == 0)
    writer.set_up_storage_writer(is_coordinator=True)
    local = [writer.prepare_local_plan(planner.create_local_plan()) for planner in planners]
    plans, metadata = planners[0].create_global_plan(local)
    results = []
    for planner, plan in zip(planners, writer.prepare_global_plan(plans), strict=True):
        results.append(writer.write_data(planner.finish_plan(plan), planner).wait())
    writer.finish(metadata, results)


def write_dcp_run(root: Path, states: Mapping[int, State], *, world: int = WORLD) -> Run:
    """Write root/base, and root/run/step_N/trainer as prime-rl does: weights, optimizer and progress in one."""
    run = _write_base(root, states)
    for step, state in states.items():
        if step:
            path = run.run / f"step_{step}" / "trainer"
            moments = {name: {"exp_avg": tensor.float() * 0.5} for name, tensor in state.items()}
            app = {"model": dict(state), "optimizers": {"state": moments}, "progress": {"step": step, "tokens": 1e6}}
            save({"app": app}, FileSystemWriter(path, single_file_per_rank=True), world=world)
            quiet_tree(run.run / f"step_{step}")
    return run


def write_dcp_safetensors_run(root: Path, states: Mapping[int, State]) -> Run:
    """Write root/base, and root/run/step_N/policy/weights/model as NeMo-RL does."""
    run = _write_base(root, states)
    for step, state in states.items():
        if step:
            path = run.run / f"step_{step}" / "policy" / "weights" / "model"
            save(state, HuggingFaceStorageWriter(str(path), save_distributed=True))
            quiet_tree(run.run / f"step_{step}")
    return run


def _write_base(root: Path, states: Mapping[int, State]) -> Run:
    write_model(root / "base", states[0])
    (root / "run").mkdir()
    return Run(root / "base", root / "run")


def _held(state: Mapping[str, Any], rank: int, world: int) -> dict[str, Any]:
    """Return what one rank holds of a nested state dict."""
    held: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            held[name] = _held(value, rank, world)
        elif isinstance(value, Tensor) and value.dim() and (axis := SHARDED.get(name, 0)) is not None:
            held[name] = _shard(value, axis, rank, world)
        else:
            held[name] = value
    return held


def _shard(tensor: Tensor, axis: int, rank: int, world: int) -> Shard:
    size = tensor.shape[axis]
    length = -(-size // world)
    first = min(rank * length, size)
    part = tensor.narrow(axis, first, min(length, size - first)).contiguous()
    shard = part.as_subclass(Shard)
    shard.part, shard.whole = part, tensor.size()
    shard.origin = tuple(first if axis == i else 0 for i in range(tensor.dim()))
    return shard


def quiet_tree(path: Path) -> None:
    for directory, _, _ in os.walk(path):
        quiet(Path(directory))
