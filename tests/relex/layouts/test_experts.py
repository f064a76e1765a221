"""Which tensors are fused experts, and what each of their matrices is called."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from relex.layouts.experts import matrices, parts
from relex.layouts.weights import Piece, TensorEntry, whole
from tests.helpers.trajectories import load

QWEN = {"model_type": "qwen3_moe", "num_experts": 4, "hidden_size": 6}
GPT_OSS = {"model_type": "gpt_oss", "num_local_experts": 4, "hidden_size": 6}
LLAMA = {"model_type": "llama4", "text_config": {"num_local_experts": 4, "hidden_size": 6}, "hidden_size": 10}
LAYER = "model.layers.0"


def cut(name: str, shape: tuple[int, ...], config: dict[str, Any]) -> list[str]:
    """Return what the first expert's matrices are called, with their shapes, turned ones marked."""
    found = matrices(whole(name, torch.bfloat16, shape, "f", 0), config)
    count = len(found) // shape[0]
    assert len(found) == count * shape[0]
    return [f"{one.name} {list(one.shape)}{' turned' * one.turned}" for one in found[:count]]


@pytest.mark.parametrize(
    ("name", "shape", "config", "expected"),
    [
        ("mlp.experts.gate_up_proj", (4, 10, 6), QWEN, ["gate_proj.weight [5, 6]", "up_proj.weight [5, 6]"]),
        ("mlp.experts.down_proj", (4, 6, 5), QWEN, ["down_proj.weight [6, 5]"]),
        # Qwen3-VL's on the Hub.
        ("mlp.experts.gate_up_proj", (4, 6, 10), QWEN, ["gate_up_proj.weight [6, 10] turned"]),
        ("mlp.experts.down_proj", (4, 5, 6), QWEN, ["down_proj.weight [5, 6] turned"]),
        # Where both sides are as wide as the model, or nobody says how wide that is, halves are not certain.
        ("mlp.experts.gate_up_proj", (4, 6, 6), QWEN, ["gate_up_proj.weight [6, 6]"]),
        ("mlp.experts.gate_up_proj", (4, 10, 6), {"num_experts": 4}, ["gate_up_proj.weight [10, 6]"]),
        ("mlp.experts.gate_up_proj", (4, 6, 6), GPT_OSS, ["gate_up_proj.weight [6, 6] turned"]),
        ("mlp.experts.gate_up_proj", (4, 6, 10), GPT_OSS, ["gate_up_proj.weight [6, 10] turned"]),
        ("mlp.experts.gate_up_proj", (4, 10, 6), GPT_OSS, ["gate_up_proj.weight [10, 6]"]),
        ("mlp.experts.gate_up_proj_bias", (4, 10), GPT_OSS, ["gate_up_proj.bias [10]"]),
        ("feed_forward.experts.gate_up_proj", (4, 6, 10), LLAMA, ["gate_up_proj.weight [6, 10] turned"]),
        ("feed_forward.experts.down_proj", (4, 5, 6), LLAMA, ["down_proj.weight [5, 6] turned"]),
        ("moe.experts.w1", (4, 5, 6), QWEN, ["w1.weight [5, 6]"]),
        ("self_attention.experts.input_linear.weight", (4, 10, 6), QWEN, ["input_linear.weight [10, 6]"]),
    ],
)
def test_each_matrix_is_called_as_if_stored_by_the_expert(
    name: str, shape: tuple[int, ...], config: dict[str, Any], expected: list[str]
) -> None:
    before = f"{LAYER}.{name[: name.index('experts.')]}experts.0."
    assert cut(f"{LAYER}.{name}", shape, config) == [before + one for one in expected]


def test_the_names_are_those_that_transformers_writes(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        vocab_size=24, hidden_size=16, moe_intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    model.save_pretrained(tmp_path)
    saved, made = load(tmp_path), {}
    for name, tensor in model.state_dict().items():
        fused = whole(name, torch.float32, tuple(tensor.shape), "f", 0)
        for one in matrices(fused, json.loads((tmp_path / "config.json").read_text())):
            made[one.name] = tensor.flatten()[one.start :][: one.shape[0] * one.shape[1]].view(one.shape)
    assert made.keys() == {name for name in saved if ".experts." in name}
    assert all(torch.equal(made[name], saved[name]) for name in made)


def test_granite_has_the_same_tensors_under_other_names() -> None:
    moe = f"{LAYER}.block_sparse_moe"
    assert cut(f"{moe}.input_linear.weight", (4, 10, 6), QWEN) == [
        f"{moe}.experts.0.gate_proj.weight [5, 6]",
        f"{moe}.experts.0.up_proj.weight [5, 6]",
    ]
    assert cut(f"{moe}.output_linear.weight", (4, 6, 5), QWEN) == [f"{moe}.experts.0.down_proj.weight [6, 5]"]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp.experts.3.down_proj.weight", (6, 5)),
        ("mlp.experts.3.down_proj.weight", (4, 6, 5)),
        ("mlp.experts.down_proj", (3, 6, 5)),
        ("mlp.experts.down_proj", (0, 6, 5)),
        ("mlp.experts.down_proj", (4, 6, 5, 2)),
        ("mlp.experts.w1", (20, 6)),
        ("mlp.experts.weight", (4, 6)),
        ("mlp.experts", (4, 6, 5)),
        ("mixer.conv1d.weight", (4, 1, 4)),
        ("input_linear.weight", (10, 6)),
    ],
)
def test_others_are_left_alone(name: str, shape: tuple[int, ...]) -> None:
    assert matrices(whole(f"{LAYER}.{name}", torch.bfloat16, shape, "f", 0), QWEN) == ()


def test_a_matrix_lies_where_the_boxes_of_the_fused_tensor_do() -> None:
    # Three ranks' rows of experts 0 and 1, two ranks' columns of 2 and 3.
    shape, name = (4, 10, 6), "mlp.experts.gate_up_proj"
    boxes = [((0, 0, 0), (2, 4, 6)), ((0, 4, 0), (2, 4, 6)), ((0, 8, 0), (2, 2, 6))]
    boxes += [((2, 0, 0), (2, 10, 3)), ((2, 0, 3), (2, 10, 3))]
    held = torch.arange(240).reshape(shape)
    files = {str(number): place(held, *box) for number, box in enumerate(boxes)}
    entry = TensorEntry(
        name, torch.int64, shape, tuple(Piece(str(number), 16, *box) for number, box in enumerate(boxes))
    )
    found = matrices(entry, QWEN)
    assert [one.start for one in found] == [30 * number for number in range(8)]
    for matrix, part in zip(found, parts(entry, found), strict=True):
        made = torch.full(matrix.shape, -1)
        for piece in part.pieces:
            begin = (piece.offset - 16) // 8
            values = files[piece.file][begin : begin + piece.shape[0] * piece.shape[1]].reshape(piece.shape)
            place(made, piece.origin, piece.shape, values)
        assert torch.equal(made.flatten(), held.flatten()[matrix.start :][:30])


def place(
    tensor: torch.Tensor, origin: tuple[int, ...], shape: tuple[int, ...], values: torch.Tensor | None = None
) -> torch.Tensor:
    """Return a box of the tensor, flat; filled with `values` before."""
    box = tensor[tuple(slice(first, first + count) for first, count in zip(origin, shape, strict=True))]
    if values is not None:
        box[:] = values
    return box.flatten()
