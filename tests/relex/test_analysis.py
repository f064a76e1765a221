"""What is said about a run, against the dense matrix of its deltas and against single weights read one by one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from relex import linearity
from relex.analysis import BINS, Analysis, analyze_run, place, series_moments
from relex.distance import Distance, along, distance
from relex.errors import MemoryBudgetError, TargetError
from relex.extrapolation import Request, extrapolate
from relex.forecast import forecast
from relex.linearity import weight_r_squared
from relex.predictors import parse_method
from relex.predictors.predictor import Window
from tests.helpers import peft_files
from tests.helpers.trajectories import FROZEN, MIB, NORM, STEPS, Run, drift, least_memory, load, measure, write_run
from tests.relex.reference import dense

Array = dense.Array

WINDOW = 4
LATER = STEPS[-1]


def all_deltas(*, frozen: bool = True) -> Array:
    """Return the deltas of the floating-point tensors of `drift`, one after the other in a row."""
    states = drift()
    names = [name for name, each in states[0].items() if each.is_floating_point() and (frozen or name != FROZEN)]
    parts = [dense.deltas(states[0][name], [states[step][name] for step in STEPS]) for name in names]
    return np.concatenate(parts, axis=1)


def all_deltas_in(names: Sequence[str]) -> Array:
    """Return the same in the given order of the tensors."""
    states = drift()
    floats = [name for name in names if states[0][name].is_floating_point()]
    parts = [dense.deltas(states[0][name], [states[step][name] for step in STEPS]) for name in floats]
    return np.concatenate(parts, axis=1)


def predicted_delta(run: Run, method: str, target: int) -> tuple[Array, Distance | None]:
    """Return the delta predicted from the first WINDOW checkpoints, combined by hand, and its distance."""
    window = run.open(window=STEPS[WINDOW - 1])
    made = forecast(window, measure(window), parse_method(method), target_step=target)
    states = drift()
    parts = []
    for name, each in states[0].items():
        if not each.is_floating_point():
            continue
        rows = dense.deltas(each, [states[step][name] for step in STEPS])[:WINDOW]
        source = made.tensors[name]
        last = np.eye(WINDOW)[-1]
        coefficients = {"combined": np.array(source.coefficients), "latest": last, "base": 0.0 * last}[source.source]
        parts.append(coefficients @ rows)
    return np.concatenate(parts), distance(measure(run.open()), made, target)


@pytest.mark.parametrize("method", ["relex", "raw", "weight-extrapolation", "expo", "hold"])
def test_the_distance_to_a_later_checkpoint_is_that_of_the_weights(run: Run, method: str) -> None:
    made, result = predicted_delta(run, method, LATER)
    deltas = all_deltas()
    real, held = deltas[-1], deltas[WINDOW - 1]
    assert result is not None
    assert result.error == pytest.approx(np.linalg.norm(made - real) / np.linalg.norm(real), rel=1e-6)
    assert result.cosine == pytest.approx(made @ real / np.linalg.norm(made) / np.linalg.norm(real), rel=1e-6)
    assert result.norm_ratio == pytest.approx(np.linalg.norm(made) / np.linalg.norm(real), rel=1e-6)
    skill = 1 - np.sum((made - real) ** 2) / np.sum((held - real) ** 2)
    assert result.skill == pytest.approx(skill, abs=1e-6)


def test_holding_has_no_skill_and_the_truth_all_of_it(run: Run) -> None:
    _, held = predicted_delta(run, "hold", LATER)
    assert held is not None
    assert held.skill == pytest.approx(0.0, abs=1e-12)
    whole = run.open()
    truth = forecast(whole, measure(whole), parse_method("hold"), target_step=LATER)
    measured = distance(measure(whole), truth, LATER)
    assert measured is not None
    assert (measured.error, measured.skill) == (0.0, None)
    assert (measured.cosine, measured.norm_ratio) == pytest.approx((1.0, 1.0))


def test_an_observed_step_needs_no_skill(run: Run) -> None:
    _, result = predicted_delta(run, "reconstruct", STEPS[1])
    assert result is not None
    assert result.skill is None
    assert 0 < result.error < 1


def test_there_is_no_distance_to_a_step_that_the_run_has_not_reached(run: Run) -> None:
    _, result = predicted_delta(run, "relex", 200)
    assert result is None


@pytest.mark.parametrize("method", ["alpha-rl", "next:ahead=1,epochs=2"])
def test_the_distance_of_what_is_no_combination_is_that_of_the_weights_too(
    run: Run, tmp_path: Path, method: str
) -> None:
    window, whole = run.open(window=STEPS[WINDOW - 1]), run.open()
    request = Request(parse_method(method), LATER, tmp_path / "out")
    (made,) = extrapolate(window, [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1, dtype="float32")
    assert made.vectors
    predicted, base = load(tmp_path / "out"), load(run.base)
    moved = [dense.wide(predicted[name]) - dense.wide(each) for name, each in base.items() if each.is_floating_point()]
    delta, real = np.concatenate(moved), all_deltas_in(list(base))[-1]
    added = along(whole, made, LATER, memory=64 * MIB, threads=1)
    measured = distance(measure(whole), made, LATER, added=added)
    assert measured is not None
    assert measured.error == pytest.approx(np.linalg.norm(delta - real) / np.linalg.norm(real), rel=1e-4)
    assert measured.cosine == pytest.approx(delta @ real / np.linalg.norm(delta) / np.linalg.norm(real), rel=1e-4)
    assert measured.norm_ratio == pytest.approx(np.linalg.norm(delta) / np.linalg.norm(real), rel=1e-4)


@pytest.mark.parametrize("rank", [1, 2, 5])
@pytest.mark.parametrize("step", [10, 25, 75])
def test_a_reconstruction_is_the_step_projected_onto_the_leading_directions(run: Run, rank: int, step: int) -> None:
    states = drift()
    gram = measure(run.open())
    method = parse_method(f"reconstruct:rank={rank}")
    found_TK = method.predictor.coefficients(Window(gram.products, torch.tensor(STEPS, dtype=torch.float64)), step)
    for name in ("model.layers.0.mlp.weight", NORM):
        rows = dense.deltas(states[0][name], [states[at][name] for at in STEPS])
        coordinates, directions = dense.coordinates(rows, rank)
        expected = coordinates[STEPS.index(step)] @ directions
        measured = found_TK[gram.names.index(name)].numpy() @ rows
        np.testing.assert_allclose(measured, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "step", "message"),
    [
        ("reconstruct", 30, r"30 is none of the window's 5, 10 to 75"),
        ("reconstruct:rank=6", 25, "rank 6 needs as many checkpoints, and the window has 5"),
        ("reconstruct:rank=0", 25, "rank is 0; give at least 1"),
    ],
)
def test_a_reconstruction_that_cannot_be_is_refused(run: Run, method: str, step: int, message: str) -> None:
    whole = run.open()
    with pytest.raises(TargetError, match=message):
        forecast(whole, measure(whole), parse_method(method), target_step=step)


def line_r_squared(values: Sequence[float], steps: Sequence[int]) -> float:
    slope, intercept = np.polyfit(steps, values, 1)
    residual = np.array(values) - (slope * np.array(steps) + intercept)
    return float(1 - (residual**2).sum() / ((np.array(values) - np.mean(values)) ** 2).sum())


def test_weights_that_hardly_move_or_take_few_values_are_left_out() -> None:
    columns = {
        "moves": [0.0, 1.0, 3.0, 2.0, 5.0],
        "range of a ten-thousandth": [0.0, 2e-5, 4e-5, 6e-5, 1e-4],
        "a little more": [0.0, 2e-5, 4e-5, 6e-5, 1.01e-4],
        "three values": [0.0, 1.0, 2.0, 1.0, 0.0],
        "four values": [0.0, 1.0, 2.0, 3.0, 0.0],
        "one value": [2.0] * 5,
    }
    values_KN = torch.tensor(list(columns.values()), dtype=torch.float64).T
    result = linearity.r_squared(values_KN, torch.tensor(STEPS, dtype=torch.float64))
    kept = [columns[name] for name in ("moves", "a little more", "four values")]
    assert result.tolist() == pytest.approx([line_r_squared(row, STEPS) for row in kept], rel=1e-9)


def test_the_sample_is_a_thousandth_or_fifty_and_each_value_is_that_of_one_entry(tmp_path: Path) -> None:
    # Longer than a unit of reading, so that a part of the sample comes from a second one.
    shapes = {"short": (8,), "frozen.weight": (16, 5), "long.weight": (1100, 1000)}
    states = drift(shapes, base=torch.float32, stored=torch.float32)
    trajectory = write_run(tmp_path, states).open()
    measured = weight_r_squared(trajectory, seed=3, memory=64 * MIB, threads=2)
    assert {name: each.drawn for name, each in measured.items()} == {
        "short": 8,
        "frozen.weight": 50,
        "long.weight": 1100,
    }
    assert len(measured["frozen.weight"].r_squared) == 0
    for name in ("short", "long.weight"):
        values_KN = torch.stack([states[step][name].flatten().double() for step in STEPS])
        entries = np.sort(linearity.squared_correlation(values_KN, torch.tensor(STEPS, dtype=torch.float64)).numpy())
        drawn = np.sort(measured[name].r_squared)
        places = np.searchsorted(entries, drawn - 1e-12)
        np.testing.assert_allclose(entries[places], drawn, rtol=0, atol=1e-12)
        assert len(set(places.tolist())) == len(drawn) == min(len(entries), 1100)


def test_the_sample_depends_on_the_seed_and_on_nothing_else(run: Run) -> None:
    trajectory = run.open()
    mlp = "model.layers.0.mlp.weight"
    first = weight_r_squared(trajectory, seed=0, memory=64 * MIB, threads=2)[mlp].r_squared
    again = weight_r_squared(trajectory, seed=0, memory=least_memory(trajectory), threads=1)[mlp].r_squared
    other = weight_r_squared(trajectory, seed=1, memory=64 * MIB, threads=2)[mlp].r_squared
    assert first.tolist() == again.tolist()
    assert first.tolist() != other.tolist()
    with pytest.raises(MemoryBudgetError, match="--memory 0 MiB is below"):
        weight_r_squared(trajectory, seed=0, memory=1, threads=1)


def test_adapters_are_sampled_as_the_weights_they_make(tmp_path: Path) -> None:
    adapters = peft_files.write_run(tmp_path)
    merged = peft_files.write_merged(adapters, tmp_path / "merged")
    measured = weight_r_squared(adapters.open(), seed=0, memory=64 * MIB, threads=2)
    expected = weight_r_squared(merged.open(), seed=0, memory=64 * MIB, threads=2)
    assert any(len(each.r_squared) for each in measured.values())
    for name, each in expected.items():
        values = measured[name].r_squared if name in measured else np.zeros(0)
        np.testing.assert_allclose(values, each.r_squared, atol=1e-3)


@pytest.fixture
def analysis(run: Run, tmp_path: Path) -> Analysis:
    return analyze_run(run.run, run.base, grams=tmp_path / "grams", memory=64 * MIB, threads=2)


def test_the_coordinates_are_those_of_all_deltas_together(analysis: Analysis) -> None:
    deltas = all_deltas()
    expected, _ = dense.coordinates(deltas, 3)
    expected = expected * np.sign(expected[-1]) / np.linalg.norm(deltas[-1])
    np.testing.assert_allclose(np.array(analysis.coordinates).T, expected, atol=1e-5)
    singular = np.linalg.svd(deltas, compute_uv=False) ** 2
    assert analysis.energies == pytest.approx((singular / singular.sum())[:3].tolist(), rel=1e-5)


def test_energy_and_r_squared_are_by_tensor_and_pooled_by_module_type(analysis: Analysis) -> None:
    states = drift()
    rows = {
        name: dense.deltas(each, [states[step][name] for step in STEPS])
        for name, each in states[0].items()
        if each.is_floating_point()
    }
    by_tensor = {part.name: part for part in analysis.tensors}
    assert by_tensor.keys() == rows.keys()
    for name, part in by_tensor.items():
        if name == FROZEN:
            assert (part.energy, part.r_squared, part.share) == (None, None, 0.0)
            continue
        assert part.energy == pytest.approx(dense.energy(rows[name], 1), rel=1e-5)
        assert part.r_squared == pytest.approx(dense.r_squared(rows[name], STEPS), rel=1e-4)
    sizes = {name: float((each**2).sum()) for name, each in rows.items()}
    energies = {name: dense.energy(each, 1) for name, each in rows.items() if name != FROZEN}
    pooled = sum(sizes[name] * value for name, value in energies.items()) / sum(sizes.values())
    assert analysis.whole.energy == pytest.approx(pooled, rel=1e-5)
    assert sum(part.share for part in analysis.modules) == pytest.approx(1.0)
    assert sum(part.weights.drawn for part in analysis.modules) == analysis.whole.weights.drawn
    assert sum(analysis.whole.weights.counts) == analysis.whole.weights.kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", ("embed_tokens", None)),
        ("lm_head.weight", ("lm_head", None)),
        ("model.layers.11.self_attn.q_proj.weight", ("self_attn.q_proj", 11)),
        ("model.layers.0.self_attn.q_proj.bias", ("self_attn.q_proj.bias", 0)),
        ("model.layers.3.mlp.experts.17.up_proj.weight", ("mlp.experts.*.up_proj", 3)),
        ("transformer.h.2.attn.c_attn.weight", ("attn.c_attn", 2)),
        ("weight", ("weight", None)),
    ],
)
def test_the_place_of_a_tensor_is_read_from_its_name(name: str, expected: tuple[str, int | None]) -> None:
    assert place(name) == expected


def test_series_that_never_change_are_left_out() -> None:
    rows = [[1.0, 2.0, 2.5, 4.0, 7.5], [3.0] * 5, [0.0, 1.0, 0.0, 1.0, 0.0]]
    result = series_moments(rows, STEPS)
    assert (result.drawn, result.kept) == (3, 2)
    assert result.counts[BINS - 1] == 1
    assert result.quartiles is not None
    assert result.quartiles[1] == pytest.approx((1.0 + line_r_squared(rows[2], STEPS)) / 2)
