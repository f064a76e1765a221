"""Which tensors of which models the matrix methods take for matrices, which way they look at them, what they leave."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from relex import matrix_updates, rank_one
from relex.extrapolation import Request, extrapolate
from relex.predictors import parse_method
from relex.predictors.alpha_rl import AlphaRL
from tests.helpers.trajectories import MIB, Run, drift, load, measure, write_run

NEXT = "next:epochs=20,ahead=2"


def models() -> Mapping[str, PreTrainedModel]:
    torch.manual_seed(0)
    return {
        "mixtral": MixtralForCausalLM(
            MixtralConfig(
                vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, num_local_experts=4,
            )
        ),
        "opt": OPTForCausalLM(
            OPTConfig(vocab_size=24, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
                      word_embed_proj_dim=16, max_position_embeddings=16)
        ),
        "t5": T5ForConditionalGeneration(
            T5Config(vocab_size=24, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        ),
        "gpt2": GPT2LMHeadModel(GPT2Config(vocab_size=24, n_embd=16, n_layer=1, n_head=2, n_positions=16)),
    }  # fmt: skip


# What is no matrix of attention or MLP: tables, norms and their like.
TABLES = ("embed", "shared", "lm_head", "wte", "wpe", "relative_attention_bias")


@pytest.mark.parametrize("family", ["mixtral", "opt", "t5", "gpt2"])
def test_every_matrix_of_attention_and_mlp_is_told_by_its_name(family: str, tmp_path: Path) -> None:
    # As they are stored, experts apart.
    models()[family].save_pretrained(tmp_path)
    for name, tensor in load(tmp_path).items():
        wanted = tensor.dim() == 2 and not any(part in name for part in TABLES)
        assert AlphaRL().moves(name, tensor.dim()) is wanted, name


def turned(states: Mapping[int, Mapping[str, Tensor]], name: str) -> dict[int, dict[str, Tensor]]:
    return {step: {**state, name: state[name].T.contiguous()} for step, state in states.items()}


def predicted(run: Run, root: Path, spec: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    request = Request(parse_method(spec), 200, root / "out")
    extrapolate(run.open(), [request], grams=root / "grams", memory=64 * MIB, threads=1)
    return load(root / "out"), json.loads((root / "out" / "relex.json").read_bytes())


@pytest.mark.parametrize("spec", ["alpha-rl", NEXT])
def test_a_layer_that_is_stored_turned_is_predicted_as_the_same_layer(spec: str, tmp_path: Path) -> None:
    name = "transformer.h.0.mlp.c_fc.weight"
    straight = drift({name: (40, 33)}, base=torch.float32, stored=torch.float32)
    ours, _ = predicted(
        write_run(tmp_path / "conv1d", turned(straight, name), config={"model_type": "gpt2"}), tmp_path / "a", spec
    )
    theirs, _ = predicted(write_run(tmp_path / "linear", straight), tmp_path / "b", spec)
    assert torch.allclose(ours[name].T, theirs[name], atol=1e-6)
    other, _ = predicted(write_run(tmp_path / "other", turned(straight, name)), tmp_path / "c", spec)
    assert not torch.allclose(other[name].T, theirs[name], atol=1e-3)


def test_what_a_method_does_not_apply_to_is_in_the_manifest(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": (30, 8), "model.layers.0.mlp.up_proj.weight": (20, 8)}
    run = write_run(tmp_path, drift(shapes, base=torch.float32, stored=torch.float32))
    _, manifest = predicted(run, tmp_path / "alpha", "alpha-rl")
    content = manifest["forecast"]
    assert isinstance(content, dict)
    assert content["copied"] == ["model.embed_tokens.weight"]
    # Beside two buffers of 5 and 3 numbers.
    assert content["copied_share"] == pytest.approx(30 * 8 / (50 * 8 + 8))
    _, manifest = predicted(run, tmp_path / "relex", "relex")
    assert manifest["forecast"]["copied"] == []  # type: ignore[index]


def test_vectors_that_were_kept_before_the_names_were_known_are_found_anew(tmp_path: Path) -> None:
    shapes = {"model.decoder.layers.0.fc1.weight": (20, 8), "model.decoder.layers.0.self_attn.q_proj.weight": (8, 8)}
    run = write_run(tmp_path, drift(shapes, base=torch.float32, stored=torch.float32))
    wanted, _ = predicted(run, tmp_path / "first", "alpha-rl")
    (kept,) = (tmp_path / "first" / "grams").rglob("*.npz")
    gram, method = measure(run.open()), parse_method("alpha-rl")
    assert isinstance(method.predictor, AlphaRL)
    key = sha256(json.dumps([1, gram.digest, matrix_updates._unit(method.predictor), 200.0]).encode()).hexdigest()
    old = (tmp_path / "second" / kept.relative_to(tmp_path / "first")).with_name(f"{key}.npz")
    old.parent.mkdir(parents=True)
    old.write_bytes(rank_one.to_bytes({}))
    ours, _ = predicted(run, tmp_path / "second", "alpha-rl")
    for name in shapes:
        assert torch.equal(ours[name], wanted[name])
