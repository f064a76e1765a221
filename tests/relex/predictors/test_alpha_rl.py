"""What AlphaRL does on its own; that it is AlphaRL, tests/reference says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.cross_decomposition import PLSRegression

from relex.errors import TargetError
from relex.extrapolation import Request, extrapolate
from relex.predictors import parse_method
from relex.predictors.alpha_rl import inverse_regression, neighbour_signs
from tests.helpers.trajectories import MIB, STEPS, Run, drift, load, write_run

Array = NDArray[np.float64]

Y = np.array(STEPS, dtype=np.float64)


def points(seed: int, *, size: int = 40) -> Array:
    generator = np.random.default_rng(seed)
    result: Array = np.outer(Y, generator.standard_normal(size)) + 9.0 * generator.standard_normal((len(Y), size))
    return result


@pytest.mark.parametrize("seed", range(5))
def test_scikit_learn_says_the_target_of_what_was_found(seed: int) -> None:
    x_KM = points(seed)
    fitted = PLSRegression(1).fit(x_KM, Y)
    for target in (0.0, 60.0, 500.0):
        found_M = inverse_regression(x_KM, Y, target)
        assert fitted.predict(found_M[None])[0] == pytest.approx(target, abs=1e-9 * 500)
        score = fitted.transform(found_M[None])
        np.testing.assert_allclose(fitted.inverse_transform(score)[0], found_M, rtol=1e-9)


def test_a_coordinate_that_never_changes_stays() -> None:
    x_KM = points(0)
    x_KM[:, 3] = 0.25
    assert inverse_regression(x_KM, Y, 500.0)[3] == 0.25


def test_points_that_are_all_the_same_stay() -> None:
    x_KM = np.tile(points(0)[:1], (len(Y), 1))
    np.testing.assert_allclose(inverse_regression(x_KM, Y, 500.0), x_KM[0])


def test_signs_follow_the_neighbour_and_not_the_first() -> None:
    angles = np.radians([0.0, 60.0, 120.0, 180.0])
    left_KM = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    flipped = np.array([1.0, -1.0, 1.0, 1.0])
    np.testing.assert_array_equal(neighbour_signs(left_KM), np.ones(4))
    np.testing.assert_array_equal(neighbour_signs(left_KM * flipped[:, None]), flipped)


def test_a_matrix_that_moves_along_a_line_goes_on_along_it(tmp_path: Path) -> None:
    shapes = {"model.layers.0.mlp.up_proj.weight": (50, 40)}
    (name,) = shapes
    states = drift(shapes, base=torch.float64, stored=torch.float64)
    generator = torch.Generator().manual_seed(1)
    step_MN = torch.outer(*(torch.randn(size, generator=generator, dtype=torch.float64) for size in shapes[name]))
    for step, state in states.items():
        state[name] = states[0][name] + step * step_MN
    run = write_run(tmp_path, states)
    request = Request(parse_method("alpha-rl"), 200, tmp_path / "out")
    extrapolate(run.open(), [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1)
    assert torch.allclose(load(tmp_path / "out")[name], states[0][name] + 200 * step_MN, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dimensions", "moved"),
    [
        ("model.layers.0.self_attn.q_proj.weight", 2, True),
        ("model.layers.0.mlp.down_proj.weight", 2, True),
        ("transformer.h.1.attn.c_attn.weight", 2, True),
        ("model.layers.0.self_attn.q_proj.bias", 1, False),
        ("model.layers.0.self_attn.q_norm.weight", 1, False),
        ("model.embed_tokens.weight", 2, False),
        ("lm_head.weight", 2, False),
        ("model.layers.0.mlp.experts.gate_up_proj", 3, False),
    ],
)
def test_attention_and_mlp_matrices_move_and_all_else_is_copied(name: str, dimensions: int, moved: bool) -> None:
    assert parse_method("alpha-rl").predictor.moves(name, dimensions) is moved


@pytest.mark.parametrize(
    ("parameters", "content", "message"),
    [
        ("goal=0.9", None, "accuracies=FILE and goal=ACCURACY are given together or not at all"),
        ("accuracies={file}", {"10": 0.1}, "accuracies=FILE and goal=ACCURACY are given together or not at all"),
        ("accuracies={file},goal=0.9", None, r"measured\.json is no JSON file of accuracies by step, .*No such file"),
        ("accuracies={file},goal=0.9", [1, 2], r"measured\.json is no JSON file of accuracies by step"),
        ("accuracies={file},goal=0.9", {"ten": 0.1}, r"measured\.json is no JSON file of accuracies by step"),
        ("accuracies={file},goal=0.9", {"10": float("nan")}, "holds an accuracy that is not finite"),
        ("accuracies=,goal=0.9", None, r"accuracies='' is not a valid str\.$"),
    ],
)
def test_accuracies_that_cannot_be_used_are_refused(
    tmp_path: Path, parameters: str, content: object, message: str
) -> None:
    file = tmp_path / "measured.json"
    if content is not None:
        file.write_text(json.dumps(content))
    with pytest.raises(TargetError, match=message) as caught:
        parse_method(f"alpha-rl:{parameters.format(file=file)}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (lambda step: 0.5, "the accuracy is 0.5 at every step of the window"),
        (
            lambda step: None if step == 25 else step / 100,
            r"the accuracies have no step 25, and the window has steps \[10",
        ),
    ],
)
def test_accuracies_that_do_not_fit_the_window_are_refused(
    run: Run, tmp_path: Path, measure: Callable[[int], float | None], message: str
) -> None:
    file = tmp_path / "measured.json"
    file.write_text(json.dumps({step: measure(step) for step in STEPS if measure(step) is not None}))
    request = Request(parse_method(f"alpha-rl:accuracies={file},goal=0.9"), 200, tmp_path / "out")
    with pytest.raises(TargetError, match=message):
        extrapolate(run.open(), [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1)
