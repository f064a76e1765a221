"""What each method is, on Grams alone: the prediction is sum_k c_k delta_k, so its coefficients tell all."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from relex.errors import TargetError
from relex.predictors import METHODS, option_help, parse_method
from relex.predictors.predictor import Window

WINDOW = torch.tensor([10.0, 20.0, 25.0, 40.0, 75.0], dtype=torch.float64)
TARGET = 200.0


@dataclass(frozen=True)
class Traits:
    """What holds for a method: `line` continues theta_0 + step v, `offset_line` continues theta_0 + u + step v."""

    line: bool
    offset_line: bool
    shift: bool
    uses_target: bool
    uses_gram: bool


TABLE = {
    "relex": Traits(line=True, offset_line=False, shift=True, uses_target=True, uses_gram=True),
    "relex:rank=2": Traits(line=True, offset_line=True, shift=True, uses_target=True, uses_gram=True),
    "relex:rank=5": Traits(line=True, offset_line=True, shift=True, uses_target=True, uses_gram=False),
    "relex-pinned": Traits(line=True, offset_line=False, shift=True, uses_target=True, uses_gram=True),
    "relex-pinned:rank=2": Traits(line=True, offset_line=True, shift=True, uses_target=True, uses_gram=True),
    "relex-pinned:damping=0.5": Traits(line=False, offset_line=False, shift=True, uses_target=True, uses_gram=True),
    "polynomial": Traits(line=True, offset_line=False, shift=True, uses_target=True, uses_gram=True),
    "polynomial:degree=1,rank=2": Traits(line=True, offset_line=True, shift=True, uses_target=True, uses_gram=True),
    "polynomial:degree=1,last=3,refit=2": Traits(
        line=True, offset_line=False, shift=True, uses_target=True, uses_gram=True
    ),
    "sinusoid": Traits(line=False, offset_line=False, shift=True, uses_target=True, uses_gram=True),
    "neural:epochs=0": Traits(line=True, offset_line=False, shift=True, uses_target=True, uses_gram=True),
    "raw": Traits(line=True, offset_line=True, shift=True, uses_target=True, uses_gram=False),
    "weight-extrapolation": Traits(line=True, offset_line=False, shift=False, uses_target=True, uses_gram=False),
    "weight-extrapolation:start=20": Traits(
        line=True, offset_line=True, shift=False, uses_target=True, uses_gram=False
    ),
    "secant": Traits(line=True, offset_line=True, shift=False, uses_target=True, uses_gram=False),
    "secant:share=0": Traits(line=True, offset_line=False, shift=False, uses_target=True, uses_gram=False),
    "travel:lr=1e-05": Traits(line=False, offset_line=False, shift=False, uses_target=True, uses_gram=False),
    # Through deltas that follow no curve it is level: the target makes no difference.
    "saturating": Traits(line=True, offset_line=False, shift=False, uses_target=False, uses_gram=True),
    "expo": Traits(line=False, offset_line=False, shift=True, uses_target=False, uses_gram=False),
    "expo:alpha=1.6666666666666667": Traits(
        line=True, offset_line=False, shift=True, uses_target=False, uses_gram=False
    ),
    "first-update:alpha=20": Traits(line=True, offset_line=False, shift=True, uses_target=False, uses_gram=False),
    "mean:last=2": Traits(line=False, offset_line=False, shift=True, uses_target=False, uses_gram=False),
    "hold": Traits(line=False, offset_line=False, shift=True, uses_target=False, uses_gram=False),
}

# Deltas with well separated singular values, so that every rank is well-posed: see trajectories.drift.
SIGMA = 0.5 ** torch.arange(5, dtype=torch.float64)


def deltas(seed: int, *, count: int = 5, size: int = 40) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(count, count, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(size, count, generator=generator, dtype=torch.float64))
    return torch.mm(left * SIGMA[:count], right.T)


def predicted(spec: str, deltas_KD: Tensor, steps_K: Tensor = WINDOW, target: float = TARGET) -> Tensor:
    coefficients_K = parse_method(spec).predictor.coefficients(Window(deltas_KD @ deltas_KD.T, steps_K), target)
    assert coefficients_K.dtype is torch.float64
    assert coefficients_K.shape == steps_K.shape
    return coefficients_K @ deltas_KD


def same(left: Tensor, right: Tensor) -> bool:
    return bool(torch.allclose(left, right, rtol=1e-9, atol=1e-9 * float(right.abs().max())))


def test_every_method_is_in_the_table() -> None:
    # What reconstructs predicts nothing, and matrix methods need more than Grams: see test_analysis, _alpha_rl, _next.
    assert {spec.partition(":")[0] for spec in TABLE} == METHODS.keys() - {"reconstruct", "alpha-rl", "next"}


@pytest.mark.parametrize(("spec", "traits"), TABLE.items())
def test_a_method_continues_the_lines_it_can_continue(spec: str, traits: Traits) -> None:
    offset, direction = deltas(0)[:2]
    line = WINDOW[:, None] * direction
    assert same(predicted(spec, line), TARGET * direction) is traits.line
    offset_line = 20.0 * offset + line
    assert same(predicted(spec, offset_line), 20.0 * offset + TARGET * direction) is traits.offset_line


@pytest.mark.parametrize(("spec", "traits"), TABLE.items())
def test_a_method_looks_only_at_what_it_says(spec: str, traits: Traits) -> None:
    predictor = parse_method(spec).predictor
    grams = [Window(deltas_KD @ deltas_KD.T, WINDOW) for deltas_KD in (deltas(0), deltas(1))]
    first = predictor.coefficients(grams[0], TARGET)
    assert same(predictor.coefficients(grams[0], 2 * TARGET), first) is not traits.uses_target
    assert same(predictor.coefficients(grams[1], TARGET), first) is not traits.uses_gram


@given(seed=st.integers(0, 99), shift=st.integers(1, 1000))
@settings(deadline=None, max_examples=8)
def test_the_origin_of_the_step_axis_matters_only_to_a_line_from_the_base(seed: int, shift: int) -> None:
    deltas_KD = deltas(seed)
    for spec, traits in TABLE.items():
        if "start=" in spec or spec.startswith(("secant", "travel")):  # names a step, or a share of the steps
            continue
        moved = predicted(spec, deltas_KD, WINDOW + shift, TARGET + shift)
        assert same(moved, predicted(spec, deltas_KD)) is traits.shift, spec


@given(seed=st.integers(0, 99), factor=st.integers(2, 1000))
@settings(deadline=None, max_examples=8)
def test_the_unit_of_the_step_axis_does_not_matter(seed: int, factor: int) -> None:
    deltas_KD = deltas(seed)
    for spec in TABLE:
        scaled = spec.replace("start=20", f"start={20 * factor}").replace("lr=1e-05", f"lr={1e-5 / factor}")
        assert same(predicted(scaled, deltas_KD, WINDOW * factor, TARGET * factor), predicted(spec, deltas_KD)), spec


@given(seed=st.integers(0, 99), count=st.integers(2, 5), target=st.integers(1, 10_000))
@settings(deadline=None, max_examples=40)
def test_relex_at_full_rank_is_raw(seed: int, count: int, target: int) -> None:
    deltas_KD, steps_K = deltas(seed, count=count), WINDOW[:count]
    assert same(
        predicted(f"relex:rank={count}", deltas_KD, steps_K, target), predicted("raw", deltas_KD, steps_K, target)
    )


@given(seed=st.integers(0, 99), rank=st.integers(1, 5))
@settings(deadline=None, max_examples=8)
def test_pinned_without_damping_left_is_hold(seed: int, rank: int) -> None:
    deltas_KD = deltas(seed)
    assert torch.equal(predicted(f"relex-pinned:damping=0,rank={rank}", deltas_KD), predicted("hold", deltas_KD))


@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=8)
def test_the_scale_of_the_deltas_scales_the_prediction(seed: int) -> None:
    # A power of two, which rounds nothing: a sinusoid through five points makes much of the last bits.
    deltas_KD, scale = deltas(seed), 2.0**-20
    for spec in TABLE:
        assert same(predicted(spec, scale * deltas_KD), scale * predicted(spec, deltas_KD)), spec


def test_the_line_is_the_least_squares_line() -> None:
    values = torch.tensor([3.0, -1.0, 4.0, 1.0, -5.0], dtype=torch.float64)
    slope, intercept = np.polyfit(WINDOW.numpy(), values.numpy(), 1)
    assert float(predicted("raw", values[:, None])) == pytest.approx(intercept + slope * TARGET)


@pytest.mark.parametrize(
    ("name", "dimensions", "moved"),
    [
        ("model.layers.0.input_layernorm.weight", 1, False),
        ("model.norm.weight", 1, False),
        ("model.layers.3.self_attn.q_norm.weight", 1, False),
        ("transformer.h.0.ln_1.weight", 1, False),
        ("transformer.ln_f.bias", 1, False),
        ("model.layers.0.self_attn.q_proj.bias", 1, True),
        ("model.embed_tokens.weight", 2, True),
        ("model.norm_like.weight", 2, True),
        ("model.linear.bias", 1, True),
    ],
)
def test_weight_extrapolation_copies_norms_and_everything_else_moves(name: str, dimensions: int, moved: bool) -> None:
    assert parse_method("weight-extrapolation").predictor.moves(name, dimensions) is moved
    for other in ("relex", "raw", "expo", "first-update:alpha=2", "mean", "hold"):
        assert parse_method(other).predictor.moves(name, dimensions)


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("relex", "relex"),
        ("relex-pinned:rank=3,damping=0.3", "relex-pinned:damping=0.3,rank=3"),
        ("relex-pinned: damping=.30 , rank=3", "relex-pinned:damping=0.3,rank=3"),
        ("expo:alpha=1e-1", "expo:alpha=0.1"),
    ],
)
def test_a_method_is_named_in_one_way(spec: str, canonical: str) -> None:
    method = parse_method(spec)
    assert method.spec == canonical
    assert parse_method(canonical) == method


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("cubic", r"method 'cubic' is not known; known are relex, .*hold\.$"),
        ("", r"method '' is not known"),
        ("relex:tank=3", r"method relex has no parameter 'tank'; it has rank\.$"),
        ("raw:rank=3", r"method raw has no parameter 'rank'; it has none\.$"),
        ("relex:rank=one", r"method relex: rank='one' is not a valid int\.$"),
        ("relex:rank=1.5", r"rank='1.5' is not a valid int\.$"),
        ("relex:rank", r"rank='' is not a valid int\.$"),
        ("relex:rank=0", r"rank is 0; give at least 1\.$"),
        ("relex-pinned:damping=nan", r"damping='nan' is not a valid float\.$"),
        ("expo:alpha=inf", r"alpha='inf' is not a valid float\.$"),
        ("secant:share=1", r"share is 1; give at least 0 and less than 1\.$"),
        ("travel:lr=-1e-5", r"lr is -1e-05; give a learning rate above 0"),
        ("first-update", r"method first-update needs alpha=…: write first-update:alpha=…\.$"),
    ],
)
def test_a_method_that_cannot_be_is_refused_with_what_can(spec: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        parse_method(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("relex:rank=6", "rank 6 needs as many checkpoints, and the window has 5"),
        ("mean:last=6", "last is 6, and the window has 5 checkpoints. Give 1 to 5"),
        ("mean:last=0", "last is 0"),
        ("weight-extrapolation:start=30", r"start 30 is not in the window, which has steps \[10, 20, 25, 40, 75\]"),
        ("weight-extrapolation:start=75", "start 75 is not before the latest step 75"),
        ("weight-extrapolation:start=-10", "start -10 is not in the window"),
    ],
)
def test_parameters_that_do_not_fit_the_window_are_refused_with_both_values(spec: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        predicted(spec, deltas(0))


def test_the_description_names_every_parameter_of_the_family() -> None:
    build: Callable[[str], dict[str, object]] = lambda spec: parse_method(spec).describe()  # noqa: E731
    assert build("relex") == {
        "name": "relex",
        "parameters": {},
        "family": {"LowRankLinear": {"rank": 1, "anchor": "base", "damping": 1.0}},
    }
    assert build("hold")["family"] == {"Mean": {"last": 1}}


@pytest.mark.parametrize(
    ("share", "start"), [(0.0, None), (0.06, None), (0.1, 10.0), (0.2, 20.0), (0.5, 40.0), (0.7, 40.0), (0.99, 40.0)]
)
def test_a_late_secant_starts_at_the_nearest_checkpoint_the_base_among_them(share: float, start: float | None) -> None:
    coefficients_K = parse_method(f"secant:share={share}").predictor.coefficients(Window(torch.eye(5), WINDOW), 150.0)
    expected_K = torch.zeros(5, dtype=torch.float64)
    expected_K[-1] = 1.0 + 75.0 / (75.0 - (start or 0.0))
    if start is not None:
        expected_K[WINDOW.tolist().index(start)] = 1.0 - expected_K[-1]
    assert torch.allclose(coefficients_K, expected_K)


def test_travel_is_the_secant_near_by_and_stands_still_far_away() -> None:
    deltas_KD = deltas(0)
    near, far = (predicted("travel:lr=1e-05", deltas_KD, target=target) for target in (75.001, 1e6))
    assert torch.allclose(near, predicted("secant", deltas_KD, target=75.001), atol=1e-6)
    # All of T = 1.5e-3 / 1e-5 = 150 steps, and no more.
    assert same(far, predicted("secant", deltas_KD, target=75.0 + 150.0))


def test_travel_without_a_learning_rate_says_how_to_give_it() -> None:
    with pytest.raises(TargetError, match=r"needs the learning rate, which a Gram does not tell: write travel:lr=…"):
        predicted("travel", deltas(0))


@pytest.mark.parametrize("tau", [5.0, 60.0, 300.0])
def test_a_run_that_saturates_goes_on_saturating(tau: float) -> None:
    direction = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    curve = torch.outer(3.0 * -torch.expm1(-WINDOW / tau), direction)
    expected = 3.0 * -torch.expm1(torch.tensor(-TARGET / tau, dtype=torch.float64)) * direction
    assert torch.allclose(predicted("saturating", curve), expected, rtol=1e-8)


def test_a_run_that_quickens_is_a_line_to_the_saturating_curve() -> None:
    direction = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    quickening = torch.outer(WINDOW**2, direction)
    line = predicted("saturating", quickening)
    assert same(2.0 * line, predicted("saturating", quickening, target=2.0 * TARGET))


def test_a_sinusoid_goes_on_as_it_began() -> None:
    steps = torch.tensor([10.0, 20.0, 25.0, 40.0, 55.0, 60.0, 75.0, 90.0], dtype=torch.float64)
    direction = torch.randn(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def delta(step: Tensor) -> Tensor:
        return 2.0 + torch.sin(2 * torch.pi * step / 80.0 + 0.4)

    wave = torch.outer(delta(steps), direction)
    expected = delta(torch.tensor(110.0, dtype=torch.float64)) * direction
    assert torch.allclose(predicted("sinusoid", wave, steps, 110.0), expected, rtol=1e-6)


def test_a_refit_goes_on_from_what_it_predicted() -> None:
    steps = torch.tensor([10.0, 20.0, 30.0, 40.0], dtype=torch.float64)
    values = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64)
    # Lines through two points, one step ahead at a time: the last slope, on and on.
    onwards = predicted("polynomial:degree=1,last=2,refit=1", values[:, None], steps, 70.0)
    assert float(onwards) == pytest.approx(9.0 + 3 * 5.0)
    # Through three points the slope of each fit is that of its ends, from the fit's own centre.
    series = values.tolist()
    for _ in range(3):
        a, b, c = series[-3:]
        series.append((a + b + c) / 3 + 2 * (c - a) / 2)
    assert float(predicted("polynomial:degree=1,last=3,refit=1", values[:, None], steps, 70.0)) == pytest.approx(
        series[-1]
    )


@pytest.mark.parametrize(
    "spec", ["polynomial:degree=5", "polynomial:last=3", "polynomial:last=6", "polynomial:rank=6", "sinusoid:last=3"]
)
def test_a_curve_with_fewer_points_than_parameters_is_refused(spec: str) -> None:
    with pytest.raises(TargetError, match=r"needs at least \d of them and no more than the window's 5"):
        predicted(spec, deltas(0))


@pytest.mark.parametrize("spec", ["polynomial:rank=0", "polynomial:degree=-1", "sinusoid:last=-1", "sinusoid:refit=-1"])
def test_a_parameter_of_a_curve_out_of_range_is_named(spec: str) -> None:
    with pytest.raises(TargetError, match=r"is (0|-1); give at least (0|1)"):
        parse_method(spec)


def test_a_row_says_what_its_parameters_are_where_it_was_published_and_whether_it_can_be_tested() -> None:
    assert METHODS["relex-pinned"].defaults == {"rank": 1, "damping": 1.0}
    assert METHODS["relex-pinned"].written == "rank=1,damping=1.0"
    assert METHODS["first-update"].written == "alpha=…"
    assert METHODS["alpha-rl"].written == "accuracies=…,goal=…"
    assert {name for name, row in METHODS.items() if row.backtest == "no"} == {
        "alpha-rl",
        "next",
        "reconstruct",
        "travel",
    }
    assert {name for name, row in METHODS.items() if row.backtest == "on demand"} == {"neural", "sinusoid"}
    assert all(bool(row.why) is (row.backtest != "yes") and "\n" not in row.summary for row in METHODS.values())


def test_the_help_of_an_option_names_every_method_with_its_parameters() -> None:
    text = option_help()
    for name, row in METHODS.items():
        assert (f"{name} ({row.written})" if row.parameters else name) in text
