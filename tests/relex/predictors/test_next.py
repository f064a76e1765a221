"""What NExt does on its own; that it is NExt, tests/reference says."""

from pathlib import Path

import numpy as np
import pytest
import torch

from relex.errors import MemoryBudgetError, TargetError
from relex.extrapolation import Request, extrapolate
from relex.predictors import next as family
from relex.predictors import next_network, parse_method
from relex.predictors.next import reference_signs
from relex.triplets import Triplets
from tests.helpers.trajectories import FROZEN, MIB, SHAPES, STEPS, Run, content, drift, load, write_run

SPEC = "next:ahead=2,epochs=3"


def predicted(run: Run, root: Path, spec: str = SPEC, *, window: int | None = None, memory: int = 64 * MIB) -> Path:
    out = root / "out"
    trajectory = run.open(window=window)
    request = Request(parse_method(spec), 500, out)
    extrapolate(trajectory, [request], grams=root / "grams", memory=memory, threads=2, dtype="float32")
    return out


def test_training_sees_nothing_past_the_window(tmp_path: Path) -> None:
    states = drift()
    run = write_run(tmp_path / "run", states)
    for name in SHAPES:
        states[75][name] = -3.0 * states[75][name]
    after = write_run(tmp_path / "after", states)
    for name in SHAPES:
        states[40][name] = 1.5 * states[40][name]
    inside = write_run(tmp_path / "inside", states)
    prediction = [
        content(predicted(checkpoint, checkpoint.base.parent / "found", window=40))
        for checkpoint in (run, after, inside)
    ]
    assert prediction[1] == prediction[0]
    assert prediction[2] != prediction[0]


def test_a_window_that_holds_no_pair_is_refused_with_both_numbers(run: Run, tmp_path: Path) -> None:
    message = r"ahead=5 apart, and the window has 5 checkpoints\. Widen it, or give ahead=4 or less\.$"
    with pytest.raises(TargetError, match=message):
        predicted(run, tmp_path, "next")
    predicted(run, tmp_path, "next:ahead=4,epochs=0")


def test_the_same_seed_is_the_same_prediction_and_the_generator_of_others_is_left_alone(
    run: Run, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (content(predicted(run, tmp_path / name)) for name in "ab")
    assert one == two
    assert torch.equal(torch.get_rng_state(), before)
    assert content(predicted(run, tmp_path / "c", f"{SPEC},seed=1")) != one


def test_what_is_added_to_the_latest_checkpoint_grows_with_alpha(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drift(base=torch.float32, stored=torch.float32))
    latest = load(run.run / f"checkpoint-{STEPS[-1]}")
    none, once, twice = (load(predicted(run, tmp_path / str(a), f"{SPEC},alpha={a}")) for a in (0, 1, 2))
    for name in SHAPES:
        torch.testing.assert_close(none[name], latest[name], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(twice[name] - latest[name], 2 * (once[name] - latest[name]), rtol=1e-3, atol=1e-5)
    for name in ("scale", FROZEN):
        assert torch.equal(once[name], latest[name])


def test_the_network_learns_which_direction_follows() -> None:
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(3, 64, generator=generator)
    seen, unseen = (directions[:, None] + 0.3 * torch.randn(3, 40, 64, generator=generator) for _ in range(2))
    cosines = []
    for epochs in (0, 300):
        network_output = next_network.learn(*(seen / 8), *(unseen[:2] / 8), epochs=epochs, seed=0)
        cosines.append(float(torch.cosine_similarity(network_output, unseen[2], dim=1).mean()))
    assert cosines[0] < 0.3, cosines
    assert cosines[1] > 0.8, cosines


def test_a_batch_in_parts_is_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    whole, local, target = (torch.randn(600, 4, generator=generator) for _ in range(3))
    network = next_network
    network_output = network.learn(whole, local, target, whole[:3], local[:3], epochs=3, seed=0)
    rows, network._ROWS = network._ROWS, 600
    try:
        expected = network.learn(whole, local, target, whole[:3], local[:3], epochs=3, seed=0)
    finally:
        network._ROWS = rows
    torch.testing.assert_close(network_output, expected, rtol=1e-4, atol=1e-6)


def test_signs_follow_one_difference_whose_own_largest_entry_is_positive() -> None:
    generator = np.random.default_rng(0)
    left, right = generator.standard_normal(5), generator.standard_normal(7)
    left[2] = -9.0
    signs = np.array([1.0, -1.0, 1.0])
    entry = Triplets(np.outer(signs, left), np.ones(3), np.outer(signs, right), np.ones(3))
    for reference in range(3):
        result = reference_signs(entry, reference)
        np.testing.assert_array_equal(result, -signs)


def test_a_tensor_with_a_longer_side_is_the_latest_checkpoints(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "LONGEST", 100)
    latest, prediction = load(run.run / f"checkpoint-{STEPS[-1]}"), load(predicted(run, tmp_path))
    assert torch.equal(prediction["model.layers.0.mlp.weight"], latest["model.layers.0.mlp.weight"].float())
    assert not torch.equal(prediction["lm_head.weight"], latest["lm_head.weight"].float())


def test_training_that_does_not_fit_is_refused_before_it_begins(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drift({"vector": (4000,)}))
    with pytest.raises(MemoryBudgetError, match=r"--memory 64 MiB is below the \d{3} MiB"):
        predicted(run, tmp_path)


@pytest.mark.parametrize("spec", ["next:ahead=0", "next:epochs=-1"])
def test_a_parameter_out_of_range_is_named(spec: str) -> None:
    with pytest.raises(TargetError, match=r"ahead is \d+ and epochs -?\d+; give at least 1 and 0"):
        parse_method(spec)
