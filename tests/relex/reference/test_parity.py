"""A predicted checkpoint is what the dense reference says, before it is rounded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from relex.forecast import forecast
from relex.output.materialise import Output, materialise
from relex.predictors import parse_method
from tests.helpers import ROOT
from tests.helpers.trajectories import FROZEN, MIB, NORM, SHAPES, STEPS, TARGET, drift, load, measure, write_run
from tests.relex.reference import dense

Reference = Callable[[dense.Array, Sequence[int], int], dense.Array]

METHODS: Mapping[str, Reference] = {
    "relex": dense.relex,
    "relex:rank=3": partial(dense.relex, rank=3),
    "relex:rank=5": partial(dense.relex, rank=5),
    "polynomial": partial(dense.polynomial, degree=3),
    "polynomial:degree=2,last=4,rank=3": partial(dense.polynomial, degree=2, rank=3, last=4),
    "raw": dense.raw,
    "relex-pinned": dense.pinned,
    "relex-pinned:damping=0.3,rank=3": partial(dense.pinned, rank=3, damping=0.3),
    "weight-extrapolation": dense.secant,
    "weight-extrapolation:start=20": partial(dense.secant, start=20),
    "secant": dense.late_secant,
    "secant:share=0.1": partial(dense.late_secant, share=0.1),
    "travel:lr=1e-5": partial(dense.travel, lr=1e-5),
    "travel:lr=3e-6,share=0": partial(dense.travel, lr=3e-6, share=0.0),
    "saturating": dense.saturating,
    "expo:alpha=0.5": lambda D, steps, target: dense.expo(D, 0.5),
    "first-update:alpha=10": lambda D, steps, target: dense.first_update(D, 10.0),
    "mean:last=3": lambda D, steps, target: dense.mean(D, 3),
}

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """How base and checkpoints are stored; shards are (of the base, of each checkpoint)."""

    base: torch.dtype
    stored: torch.dtype
    shards: tuple[int, int] = (1, 1)


CASES = {
    "bf16": Case(BF16, BF16),
    "bf16-sharded": Case(BF16, BF16, (3, 2)),
    "fp16": Case(FP16, FP16),
    "fp16-sharded-checkpoints": Case(FP16, FP16, (1, 4)),
    "fp32": Case(FP32, FP32),
    "fp32-sharded-base": Case(FP32, FP32, (2, 1)),
    "fp32-base-bf16-checkpoints": Case(FP32, BF16),
    "fp32-base-fp16-checkpoints-sharded": Case(FP32, FP16, (2, 3)),
    "bf16-base-fp32-checkpoints": Case(BF16, FP32),
    "fp64": Case(FP64, FP64),
}


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def predicted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run and every method's prediction of it, in one pass, kept in fp32 or fp64: before rounding."""
    case: Case = request.param
    root = tmp_path_factory.mktemp("parity")
    states = drift(base=case.base, stored=case.stored)
    run = write_run(root, states, base_shards=case.shards[0], shards=case.shards[1])
    trajectory = run.open()
    gram = measure(trajectory)
    dtype = None if case.base in (FP32, FP64) else "float32"
    outputs = [
        Output(forecast(trajectory, gram, parse_method(spec), target_step=TARGET, dtype=dtype), root / spec)
        for spec in METHODS
    ]
    materialise(trajectory, outputs, memory=64 * MIB, threads=2)
    return root


@pytest.mark.parametrize("method", METHODS)
def test_a_prediction_agrees_with_the_dense_reference_before_rounding(predicted: Path, method: str) -> None:
    base = load(predicted / "base")
    checkpoints = [load(predicted / "run" / f"checkpoint-{step}") for step in STEPS]
    loaded = load(predicted / method)
    assert loaded.keys() == base.keys()
    for name in SHAPES.keys() - {FROZEN}:
        origin, stored = base[name], [checkpoint[name] for checkpoint in checkpoints]
        if method.startswith("weight-extrapolation") and name == NORM:
            expected = dense.wide(stored[-1])
        else:
            expected = dense.wide(origin) + METHODS[method](dense.deltas(origin, stored), STEPS, TARGET)
        # Near zero the fp32 rounding of an element's terms remains, and those are as large as the largest element.
        atol = 1e-6 * np.abs(expected).max()
        np.testing.assert_allclose(dense.wide(loaded[name]), expected, rtol=1e-5, atol=atol, err_msg=name)
        assert loaded[name].shape == origin.shape


def test_a_frozen_tensor_keeps_the_bytes_of_the_base(predicted: Path) -> None:
    base = load(predicted / "base")[FROZEN]
    for method in METHODS:
        loaded = load(predicted / method)[FROZEN]
        assert torch.equal(loaded, base.to(loaded.dtype))


def test_integers_and_booleans_come_from_the_latest_checkpoint(predicted: Path) -> None:
    latest = load(predicted / "run" / f"checkpoint-{STEPS[-1]}")
    for method in METHODS:
        loaded = load(predicted / method)
        for name in ("position_ids", "mask"):
            assert loaded[name].dtype == latest[name].dtype
            assert torch.equal(loaded[name], latest[name])


# What the authors' run scripts say: model, checkpoints that are seen, label of the target.
PUBLISHED = (("Qwen2.5-Math-1.5B", 75, 500), ("Qwen3-4B-Base", 75, 500), ("Qwen3-8B-Base", 100, 750))


def published(D: dense.Array, model: str, seen: int, label: int) -> dense.Array:
    """Their arithmetic: time counts checkpoints from 0, and the target lies so many steps ahead of the last one."""
    scaling = 2.0 if "Qwen2.5-Math-1.5B" in model else 1.0
    values, directions = dense.coordinates(D[:seen], 1)
    intercept, slope = dense.fit(values, range(seen))
    target = seen - 1 + round(label * scaling) - seen
    delta: dense.Array = (intercept + slope * target) @ directions
    return delta


@pytest.mark.parametrize(("model", "seen", "label"), PUBLISHED)
def test_the_target_step_that_is_documented_is_the_published_one(model: str, seen: int, label: int) -> None:
    lines = (ROOT / "docs" / "methods.md").read_text().splitlines()
    (row,) = (line.strip("|").split("|") for line in lines if line.startswith(f"| RELEX-{model} |"))
    _, trajectory, window, said, target = (cell.strip() for cell in row)
    assert (trajectory, int(window), int(said)) == (f"`hf://relex-rlvr/RLVR-{model}`", seen, label)
    walk = np.random.default_rng(0).standard_normal((seen, 40)).cumsum(axis=0)
    ours = dense.relex(walk, range(1, seen + 1), int(target))
    np.testing.assert_allclose(ours, published(walk, model, seen, label), rtol=1e-9)
