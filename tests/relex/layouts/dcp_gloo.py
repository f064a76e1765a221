"""One process of a small FSDP2 training run that saves as trainers do: `python dcp_gloo.py ROOT RANK WORLD`.

ROOT gets base (the model at step 0), full/checkpoint-N (what is gathered), trainer/step_N (prime-rl's), nemo/step_N
(NeMo-RL's first DTensor backend), safetensors/step_N (its second), and plain/step_N (a model saved by itself).
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.helpers.trajectories import write_model

STEPS = (10, 25, 40)
BY_COLUMNS = "model.layers.1.mlp.down_proj.weight"
ON_EVERY_RANK = "model.layers.0.input_layernorm.weight"
# The vocabulary and the intermediate size do not divide by two processes.
CONFIG = Qwen2Config(
    vocab_size=37,
    hidden_size=12,
    intermediate_size=19,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    tie_word_embeddings=True,
)


def run(root: Path, rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(CONFIG)
    if rank == 0:
        write_model(root / "base", _named(model.state_dict()), config=CONFIG.to_dict())
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in STEPS:
        ids = torch.randint(0, CONFIG.vocab_size, (2, 8), generator=torch.Generator().manual_seed(step))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _save(root, f"step_{step}", model, optimizer, rank)


def _save(root: Path, step: str, model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, rank: int) -> None:
    weights, moments = get_state_dict(model, optimizer)
    weights[BY_COLUMNS] = _redistributed(weights[BY_COLUMNS], Shard(1))
    weights[ON_EVERY_RANK] = _redistributed(weights[ON_EVERY_RANK], Replicate())
    app = {"model": weights, "optimizers": moments, "scheduler": {"last_epoch": 3}, "progress": {"step": 3}}
    save({"app": app}, storage_writer=FileSystemWriter(root / "trainer" / step / "trainer"))
    save({"model": weights}, storage_writer=FileSystemWriter(root / "nemo" / step / "policy" / "weights"))
    plain = weights | {"optim.state.step": torch.tensor(3.0), "lr_scheduler": 1}
    save(plain, storage_writer=FileSystemWriter(root / "plain" / step, thread_count=2))
    sharded = root / "safetensors" / step / "policy" / "weights" / "model"
    # Both names of a tied head share their memory, which safetensors refuses: NeMo-RL leaves the second out too.
    weights.pop("lm_head.weight")
    save(weights, storage_writer=HuggingFaceStorageWriter(str(sharded), save_distributed=True))
    full = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        write_model(root / "full" / step.replace("step_", "checkpoint-"), _named(full), config=CONFIG.to_dict())


def _redistributed(tensor: object, placement: Shard | Replicate) -> DTensor:
    assert isinstance(tensor, DTensor)
    return distribute_tensor(tensor.full_tensor(), tensor.device_mesh, [placement])


def _named(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the state with its tied head once."""
    return {name: tensor.clone() for name, tensor in state.items() if name != "lm_head.weight"}


if __name__ == "__main__":
    place, own_rank, processes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    method = f"file://{place.resolve()}/store"
    dist.init_process_group("gloo", init_method=method, rank=own_rank, world_size=processes)
    try:
        run(place, own_rank, processes)
    finally:
        dist.destroy_process_group()
