"""Small training runs of four processes that save as verl does: `python gloo_verl.py ROOT`.

ROOT gets base (the model at step 0) and, for every way to shard in KINDS, KIND/run/global_step_N/actor as verl's
checkpoint manager saves it and KIND/full/checkpoint-N, the same weights gathered; the KINDS of LORA are adapters.
"""

import copy
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy, transformer_auto_wrap_policy
from torch.multiprocessing.spawn import start_processes
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from tests.helpers.trajectories import quiet, write_model
from tests.helpers.verl_files import quiet_step, rank_file, write_settings

WORLD = 4
STEPS = (10, 25, 40)
# The vocabulary and the intermediate size do not divide by four ranks, and of the six keys the last rank has none.
CONFIG = Qwen2Config(
    vocab_size=37,
    hidden_size=12,
    intermediate_size=19,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)
BUFFER = "model.scale"
FSDP1 = FullyShardedDataParallel


@dataclass(frozen=True)
class Kind:
    """One way to shard: which version of FSDP, over a mesh of which shape (None: over no mesh)."""

    version: int
    mesh: tuple[int, ...] | None
    lora: Literal["", "whole", "only"] = ""


KINDS = {
    "fsdp2": Kind(2, (WORLD,)),
    "fsdp2_hybrid": Kind(2, (2, WORLD // 2)),
    "fsdp1": Kind(1, (WORLD,)),
    "fsdp1_hybrid": Kind(1, (2, WORLD // 2)),
    "fsdp1_without_mesh": Kind(1, None),
}
# With the base beside the factors, and with verl's save_lora_only.
LORA = {
    "lora_fsdp2": Kind(2, (WORLD,), "whole"),
    "lora_only_fsdp2": Kind(2, (WORLD,), "only"),
    "lora_fsdp1": Kind(1, (WORLD,), "whole"),
    "lora_only_fsdp1": Kind(1, (WORLD,), "only"),
}
# A rank that does not divide by the number of processes.
META = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
ADAPTED = LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])


def build(*, lora: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(CONFIG)
    # Not a parameter, so no FSDP shards it.
    model.model.register_buffer("scale", torch.tensor([1.0, 2.0, 3.0]))
    return get_peft_model(model, copy.deepcopy(ADAPTED)) if lora else model


def shard(model: nn.Module, kind: Kind) -> nn.Module:
    mesh = (
        None
        if kind.mesh is None
        else init_device_mesh("cpu", kind.mesh, mesh_dim_names=("ddp", "fsdp")[-len(kind.mesh) :])
    )
    if kind.version == 2:
        assert mesh is not None
        for module in model.modules():
            if isinstance(module, Qwen2DecoderLayer):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model
    layer = partial(transformer_auto_wrap_policy, transformer_layer_cls={Qwen2DecoderLayer})
    # As verl: what is trained apart from what is frozen.
    trainable = partial(lambda_auto_wrap_policy, lambda_fn=_is_trained)
    hybrid = mesh is not None and mesh.ndim == 2
    return FSDP1(
        model,
        auto_wrap_policy=partial(_or_policy, policies=[trainable, layer]) if kind.lora else layer,
        sharding_strategy=ShardingStrategy.HYBRID_SHARD if hybrid else ShardingStrategy.FULL_SHARD,
        device_id=torch.device("cpu"),
        device_mesh=mesh,
        use_orig_params=False,
    )


def _is_trained(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.named_children()) and weight is not None and bool(weight.requires_grad)


def states(model: nn.Module, kind: Kind) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what verl saves of this rank, and on rank 0 all of it gathered."""
    if kind.version == 2:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return model.state_dict(), get_model_state_dict(model, options=options)
    with FSDP1.state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        full = separate(model.state_dict())
    # As verl without a GPU: no offload.
    with FSDP1.state_dict_type(model, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig()):
        return model.state_dict(), full


def train(root: Path, kind: Kind, *, rank: int) -> None:
    model = shard(build(lora=bool(kind.lora)), kind)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.3)
    for step in STEPS:
        ids = torch.randint(0, CONFIG.vocab_size, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        sharded, full = states(model, kind)
        actor = root / "run" / f"global_step_{step}" / "actor"
        if rank == 0:
            write_settings(actor, world=WORLD, config=CONFIG.to_dict())
            write_full(root / "full" / f"checkpoint-{step}", separate(full), kind)
        if kind.lora and rank == 0:
            (actor / "lora_train_meta.json").write_text(json.dumps(META))
        if kind.lora == "only":
            sharded = {name: value for name, value in sharded.items() if "lora_" in name or ".adapter_" in name}
        dist.barrier()
        torch.save(sharded, actor / rank_file(rank, world=WORLD))
        dist.barrier()
        if rank == 0:
            quiet_step(actor.parent)


def write_full(path: Path, full: Mapping[str, Tensor], kind: Kind) -> None:
    """Write what was gathered: as one model, or by peft as an adapter."""
    if not kind.lora:
        write_model(path, full, config=CONFIG.to_dict())
        return
    model = build(lora=True)
    model.load_state_dict(full)
    assert isinstance(model, PeftModel)
    model.save_pretrained(str(path))
    quiet(path)


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with memory of their own, which safetensors asks for."""
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def run(rank: int, root: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{root}/store", rank=rank, world_size=WORLD)
    if rank == 0:
        write_model(root / "base", separate(build().state_dict()), config=CONFIG.to_dict())
    for name, kind in (KINDS | LORA).items():
        train(root / name, kind, rank=rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    # Forked: to import everything takes longer than all the rest.
    start_processes(run, (Path(sys.argv[1]),), nprocs=WORLD, start_method="fork")  # type: ignore[no-untyped-call]
