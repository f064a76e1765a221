"""What the matrix methods predict is what the dense reference says, for whole models and for adapters."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from relex.extrapolation import Request, extrapolate
from relex.predictors import parse_method
from tests.helpers import peft_files
from tests.helpers.trajectories import MIB, STEPS, Run, drift, load, write_run
from tests.relex.reference import matrix

SHAPES = {
    "model.embed_tokens.weight": (23, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.0.mlp.up_proj.weight": (257, 131),
    "model.layers.1.mlp.up_proj.weight": (257, 131),
    "model.layers.0.self_attn.q_proj.weight": (64, 131),
    "model.layers.0.self_attn.q_proj.bias": (64,),
    "scale": (),
}
NEXT = "next:ahead=2,alpha=0.7,epochs=25,seed=3"


def dense(base: Mapping[str, Tensor], states: list[dict[str, Tensor]]) -> dict[str, list[matrix.Array]]:
    return {name: [each[name].double().numpy() for each in (base, *states)] for name in base}


def predict(run: Run, root: Path, *specs: str, target: int = 200) -> list[dict[str, Tensor]]:
    requests = [Request(parse_method(spec), target, root / str(place)) for place, spec in enumerate(specs)]
    extrapolate(run.open(), requests, grams=root / "grams", memory=64 * MIB, threads=2, dtype="float32")
    return [load(request.directory) for request in requests]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    root = tmp_path_factory.mktemp("full")
    return write_run(root, drift(SHAPES, base=request.param, stored=request.param), shards=2), root


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, list[matrix.Array]]]:
    root = tmp_path_factory.mktemp("adapters")
    run = peft_files.write_run(root / "run", rank=3)
    merged = peft_files.write_merged(run, root / "merged")
    return run, dense(load(merged.base), [load(merged.run / f"checkpoint-{step}") for step in STEPS])


def close(result: Tensor, expected: matrix.Array, origin: matrix.Array, name: str, *, rtol: float) -> None:
    """Compare what was added to `origin`: of the weights themselves it is a small part."""
    added, wanted = result.double().numpy() - origin, expected - origin
    np.testing.assert_allclose(added, wanted, atol=rtol * np.abs(wanted).max() + 1e-6, err_msg=name)


def test_alpha_rl_agrees_with_scikit_learn_on_full_decompositions(full: tuple[Run, Path]) -> None:
    run, root = full
    accuracies = {10: 0.30, 20: 0.36, 25: 0.35, 40: 0.5, 75: 0.6}
    (root / "accuracies.json").write_text(json.dumps(accuracies))
    by_step, by_accuracy = predict(
        run, root / "alpha", "alpha-rl", f"alpha-rl:accuracies={root / 'accuracies.json'},goal=0.9"
    )
    W = dense(load(run.base), [load(run.run / f"checkpoint-{step}") for step in STEPS])
    for name, states in W.items():
        if ".mlp." in name or name.endswith("q_proj.weight"):
            close(by_step[name], matrix.alpha_rl(states, STEPS, 200), states[0], name, rtol=1e-5)
            expected = matrix.alpha_rl(states, list(accuracies.values()), 0.9)
            close(by_accuracy[name], expected, states[0], name, rtol=1e-5)
        else:
            np.testing.assert_array_equal(by_step[name].double().numpy(), states[-1].astype(np.float32), err_msg=name)


def test_alpha_rl_agrees_on_adapters(adapters: tuple[Run, dict[str, list[matrix.Array]]], tmp_path: Path) -> None:
    run, W = adapters
    (prediction,) = predict(run, tmp_path, "alpha-rl")
    for name in (name for name in W if "_proj.weight" in name):
        close(prediction[name], matrix.alpha_rl(W[name], STEPS, 200), W[name][0], name, rtol=1e-4)


def test_next_agrees_with_networks_written_out_in_double_precision(full: tuple[Run, Path]) -> None:
    run, root = full
    (prediction,) = predict(run, root / "next", NEXT)
    W = dense(load(run.base), [load(run.run / f"checkpoint-{step}") for step in STEPS])
    moving = {name: states for name, states in W.items() if name in SHAPES and states[0].ndim}
    expected = matrix.next_(moving, ahead=2, epochs=25, seed=3, alpha=0.7)
    for name, states in moving.items():
        close(prediction[name], expected[name], states[-1], name, rtol=1e-3)
    for name in W.keys() - moving.keys():
        np.testing.assert_array_equal(prediction[name].double().numpy(), W[name][-1], err_msg=name)


def test_next_agrees_on_adapters(adapters: tuple[Run, dict[str, list[matrix.Array]]], tmp_path: Path) -> None:
    run, W = adapters
    (prediction,) = predict(run, tmp_path, NEXT)
    moving = {name: states for name, states in W.items() if "_proj.weight" in name}
    expected = matrix.next_(moving, ahead=2, epochs=25, seed=3, alpha=0.7)
    for name, states in moving.items():
        close(prediction[name], expected[name], states[-1], name, rtol=1e-3)
