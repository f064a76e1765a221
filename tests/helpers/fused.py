"""A tiny mixture of experts stored both ways: a tensor for each matrix of each expert, and all of a layer in one."""

from collections.abc import Mapping

import torch
from torch import Tensor

EXPERTS, WIDTH, INNER = 3, 1101, 32
CONFIG = {"model_type": "qwen3_moe", "num_experts": EXPERTS, "hidden_size": WIDTH, "moe_intermediate_size": INNER}
LAYER = "model.layers.0.mlp"
GATE_UP, DOWN = f"{LAYER}.experts.gate_up_proj", f"{LAYER}.experts.down_proj"
# One matrix is longer than a chunk and no multiple of one.
SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (23, WIDTH),
    "model.layers.0.self_attn.q_proj.weight": (8, WIDTH),
    "model.layers.0.self_attn.conv1d.weight": (EXPERTS, 1, 4),
    f"{LAYER}.gate.weight": (EXPERTS, WIDTH),
    **{
        f"{LAYER}.experts.{expert}.{name}.weight": shape
        for expert in range(EXPERTS)
        for name, shape in (("gate_proj", (INNER, WIDTH)), ("up_proj", (INNER, WIDTH)), ("down_proj", (WIDTH, INNER)))
    },
}


def fuse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with all experts in two tensors, as transformers keeps them."""
    fused = {name: tensor for name, tensor in state.items() if ".experts." not in name}

    def of(name: str) -> list[Tensor]:
        return [state[f"{LAYER}.experts.{expert}.{name}.weight"] for expert in range(EXPERTS)]

    fused[GATE_UP] = torch.stack([torch.cat(pair) for pair in zip(of("gate_proj"), of("up_proj"), strict=True)])
    fused[DOWN] = torch.stack(of("down_proj"))
    return fused


def unfuse(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with a tensor for each matrix of each expert."""
    unfused = {name: tensor for name, tensor in state.items() if name not in (GATE_UP, DOWN)}
    for expert, (gate_up, down) in enumerate(zip(state[GATE_UP], state[DOWN], strict=True)):
        for name, tensor in zip(("gate_proj", "up_proj", "down_proj"), (*gate_up.chunk(2), down), strict=True):
            unfused[f"{LAYER}.experts.{expert}.{name}.weight"] = tensor.contiguous()
    return unfused
