import json
from pathlib import Path

import numpy as np
import pytest
import torch

from relex.errors import TargetError
from relex.forecast import Forecast, check_target, forecast
from relex.interval import norm_band
from relex.predictors import parse_method
from tests.helpers.trajectories import (
    FROZEN,
    NORM,
    SHAPES,
    STEPS,
    TARGET,
    Run,
    drift,
    load,
    measure,
    predict,
    write_run,
)
from tests.relex.reference import dense

STEPS_K = torch.tensor(STEPS, dtype=torch.float64)
SPECS = ("relex", "relex:rank=3", "relex-pinned:damping=0.3", "weight-extrapolation", "hold", "mean:last=3")


@pytest.mark.parametrize("spec", SPECS)
def test_a_forecast_survives_json_exactly(run: Run, spec: str) -> None:
    made = predict(run.open(), spec)
    back = Forecast.from_json(json.loads(json.dumps(made.to_json())))
    assert back == made
    assert back.digest == made.digest


def test_equal_inputs_have_equal_digests_wherever_they_lie(run: Run, tmp_path: Path) -> None:
    elsewhere = write_run(tmp_path / "elsewhere", drift(), shards=3)
    assert predict(run.open()).digest == predict(elsewhere.open()).digest


def test_whatever_decides_the_bytes_decides_the_digest(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    gram = measure(trajectory)
    digests = {predict(trajectory, spec).digest for spec in SPECS}
    digests.add(predict(trajectory, target=201).digest)
    digests.add(predict(run.open(window=40)).digest)
    dtype = "float32"
    digests.add(forecast(trajectory, gram, parse_method("relex"), target_step=TARGET, dtype=dtype).digest)
    digests.add(predict(write_run(tmp_path / "other", drift(seed=1)).open()).digest)
    assert len(digests) == len(SPECS) + 4


def test_another_base_is_another_prediction_even_with_the_same_coefficients(run: Run, tmp_path: Path) -> None:
    states = drift()
    states[0]["model.layers.0.mlp.weight"][3, 4] += 1.0
    one, other = predict(run.open(), "expo"), predict(write_run(tmp_path / "other", states).open(), "expo")
    assert one.digests == other.digests
    assert {name: tensor.coefficients for name, tensor in one.tensors.items()} == {
        name: tensor.coefficients for name, tensor in other.tensors.items()
    }
    assert one.digest != other.digest


def test_another_checkpoint_is_another_prediction_even_with_the_same_coefficients(run: Run, tmp_path: Path) -> None:
    states = drift()
    states[STEPS[-1]]["model.layers.0.mlp.weight"][3, 4] += 1.0
    one, other = predict(run.open(), "expo"), predict(write_run(tmp_path / "other", states).open(), "expo")
    assert one.base_digest == other.base_digest
    assert {name: tensor.coefficients for name, tensor in one.tensors.items()} == {
        name: tensor.coefficients for name, tensor in other.tensors.items()
    }
    assert one.digest != other.digest


def test_a_forecast_says_how_every_tensor_is_made(run: Run) -> None:
    sources = {name: tensor.source for name, tensor in predict(run.open(), "weight-extrapolation").tensors.items()}
    assert sources == dict.fromkeys(SHAPES, "combined") | {
        FROZEN: "base",
        NORM: "latest",
        "position_ids": "latest",
        "mask": "latest",
    }
    assert {tensor.source for tensor in predict(run.open(), "hold").tensors.values()} == {"base", "latest"}


def test_the_numbers_of_the_whole_prediction_are_those_of_the_dense_deltas(run: Run) -> None:
    base, checkpoints = load(run.base), [load(run.run / f"checkpoint-{step}") for step in STEPS]
    moving = [dense.deltas(base[name], [checkpoint[name] for checkpoint in checkpoints]) for name in SHAPES]
    made = predict(run.open(), "relex")
    predicted = [dense.relex(D, STEPS, TARGET) if D.any() else D[0] for D in moving]
    assert made.norm == pytest.approx(sum((delta**2).sum() for delta in predicted) ** 0.5, rel=1e-9)
    assert made.norm_latest == pytest.approx(sum((D[-1] ** 2).sum() for D in moving) ** 0.5, rel=1e-9)
    trace = [(D**2).sum() for D in moving]
    shares = [dense.energy(D, 1) if D.any() else 1.0 for D in moving]
    expected = sum(share * weight for share, weight in zip(shares, trace, strict=True)) / sum(trace)
    assert made.energy == pytest.approx(expected, rel=1e-9)
    D = np.concatenate(moving, axis=1)
    assert made.norm_band is not None
    assert made.norm_band == pytest.approx(norm_band(torch.from_numpy(D @ D.T)[None], STEPS_K, TARGET), rel=1e-9)


def test_amplification_is_the_largest_sum_of_absolute_coefficients(run: Run) -> None:
    assert predict(run.open(), "first-update:alpha=-7").amplification == pytest.approx(7.0)
    assert predict(run.open(), "hold").amplification == 1.0


def test_what_never_moved_amplifies_nothing(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, drift({NORM: (8,), FROZEN: (4, 4)})).open()
    assert predict(trajectory, "weight-extrapolation").amplification == 1.0


def test_a_run_that_never_moved_is_forecast_as_its_base(tmp_path: Path) -> None:
    states = drift({FROZEN: (4, 4)})
    made = predict(write_run(tmp_path, states).open())
    assert made.tensors[FROZEN].source == "base"
    assert (made.norm, made.energy, made.r_squared) == (0.0, 1.0, 1.0)


@pytest.mark.parametrize("target", [75, 74, 10])
def test_a_target_inside_the_window_needs_to_be_allowed(target: int) -> None:
    with pytest.raises(TargetError, match=rf"target step {target} is not beyond the window, which ends at step 75"):
        check_target(target, STEPS)
    check_target(target, STEPS, inside="allow")


@pytest.mark.parametrize("target", [0, -5])
def test_a_target_that_is_no_training_step_is_always_refused(target: int) -> None:
    with pytest.raises(TargetError, match=f"target step is {target}; give a training step after 75"):
        check_target(target, STEPS, inside="allow")


def test_a_target_just_beyond_the_window_is_fine() -> None:
    check_target(76, STEPS)
