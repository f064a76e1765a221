"""The backtest against dense predictions, and what it recommends on runs whose truth is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from relex.backtest import backtest as module
from relex.backtest.backtest import backtest, share_as_far
from relex.backtest.skill import Jumps, Way, jumps, tried
from relex.errors import DuplicateError, TargetError
from relex.gram import Gram
from relex.predictors import METHODS, parse_method
from relex.predictors.predictor import Window

# With holes, as stores have them.
STEPS = (5, 10, 15, 20, 25, 40, 50, 60, 65, 80, 120, 125)
EVERY = tuple(range(1, 25))
FEW = tuple(range(3, 37, 3))

Path = Callable[[torch.Generator, Sequence[int], int], Tensor]


def gram_of(deltas_TKD: Tensor, steps: Sequence[int]) -> Gram:
    """Return the Gram of deltas as `measure` would."""
    digests = tuple(f"checkpoint {step}" for step in steps)
    names = tuple(f"tensor {place}" for place in range(len(deltas_TKD)))
    norms = torch.ones(len(names), dtype=torch.float64)
    return Gram(tuple(steps), names, deltas_TKD @ deltas_TKD.mT, norms, "base", digests, digests)


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def walk(generator: torch.Generator, steps: Sequence[int], size: int) -> Tensor:
    """Return (K, size) of a random walk."""
    times = torch.tensor([0, *steps], dtype=torch.float64)
    return (noise(generator, len(steps), size) * times.diff().sqrt()[:, None]).cumsum(0)


def line(generator: torch.Generator, steps: Sequence[int], size: int) -> Tensor:
    """Return (K, size) of a straight drift of length 1 a step, with noise of 5 % of the whole way."""
    direction = noise(generator, size)
    times = torch.tensor(steps, dtype=torch.float64)
    deviation = 0.05 * steps[-1] / math.sqrt(size)
    return torch.outer(times, direction / direction.norm()) + deviation * noise(generator, len(steps), size)


def hold_share(path: Path, steps: Sequence[int], size: int, *, runs: int) -> float:
    """Return how often, of `runs`, the recommendation is to hold."""
    held = 0
    for seed in range(runs):
        deltas = path(torch.Generator().manual_seed(seed), steps, size)
        held += backtest(gram_of(deltas[None], steps)).recommendation.method == "hold"
    return held / runs


EVERY_LINEAR = (
    "relex:rank=2",
    "polynomial:degree=2",
    "sinusoid",
    "neural:epochs=1",
    "raw",
    "weight-extrapolation",
    "secant:share=0.3",
    "saturating",
    "expo:alpha=1.0",
    "first-update:alpha=20.0",
    "mean:last=2",
    "hold",
)


def test_every_method_that_has_a_backtest_is_tried_here() -> None:
    tested = {spec.partition(":")[0] for spec in (*tried(()), *EVERY_LINEAR)}
    assert tested == {name for name, row in METHODS.items() if row.backtest != "no"}


def test_every_jump_is_what_the_dense_prediction_of_the_method_gives() -> None:
    generator = torch.Generator().manual_seed(3)
    deltas_TKD = torch.stack([line(generator, STEPS, 9), walk(generator, STEPS, 9)])
    usual = ("relex", *(f"relex-pinned:damping={value}" for value in ("0.1", "0.3", "0.6", "1")))
    assert tried(()) == usual
    gram_TKK = gram_of(deltas_TKD, STEPS).products
    made = jumps(gram_TKK, STEPS, tried(EVERY_LINEAR))
    assert {way.method for way, _ in made} == {*usual, *EVERY_LINEAR}
    assert {way.start for way, _ in made} == {0.0, 0.5, 0.75}
    for (way, horizon), jump in made.items():
        predictor = parse_method(way.method).predictor
        for row, (origin, target) in enumerate(zip(jump.origins, jump.targets, strict=True)):
            assert (1 + horizon) * origin <= target < (1 + 2 * horizon) * origin
            rows = [place for place, step in enumerate(STEPS) if way.start * origin <= step <= origin]
            seen_TWD = deltas_TKD[:, rows]
            steps_W = torch.tensor([STEPS[place] for place in rows], dtype=torch.float64)
            # From the same bits: where the fit of a sinusoid ends hangs on the last one.
            seen = Window(gram_TKK[:, rows][:, :, rows], steps_W)
            predicted_TD = torch.einsum("tw,twd->td", predictor.coefficients(seen, target), seen_TWD)
            real_TD, held_TD = deltas_TKD[:, STEPS.index(target)], deltas_TKD[:, STEPS.index(origin)]
            expected = {
                "missed": (predicted_TD - real_TD).square().sum(-1),
                "held": (held_TD - real_TD).square().sum(-1),
                "inner": (predicted_TD * real_TD).sum(-1),
                "predicted": predicted_TD.square().sum(-1),
                "real": real_TD.square().sum(-1),
            }
            for name, value in expected.items():
                assert getattr(jump, name)[row].tolist() == pytest.approx(value.tolist(), rel=1e-9), (
                    way,
                    name,
                )


def test_a_method_is_tried_once_however_it_is_written() -> None:
    assert tried(["relex-pinned", "relex:rank=1", "relex-pinned:damping=0.30"]) == tried(())
    assert tried(["raw", "raw"]) == (*tried(()), "raw")


@pytest.mark.parametrize(
    ("spec", "why"),
    [("next", "reads the weights"), ("alpha-rl", "reads the weights"), ("reconstruct", "predicts nothing")],
)
def test_a_method_without_a_backtest_is_refused_with_its_reason(spec: str, why: str) -> None:
    with pytest.raises(TargetError, match=rf"method {spec} has no backtest: it {why}.* Choose among relex, .*hold\.$"):
        tried([spec])


def test_a_method_that_fits_no_window_has_no_cell() -> None:
    deltas = line(torch.Generator().manual_seed(0), EVERY, 30)[None]
    made = backtest(gram_of(deltas, EVERY), methods=["polynomial:degree=40"])
    assert made.methods[-1] == "polynomial:degree=40"
    assert {cell.way.method for cell in made.cells} == set(tried(()))


def test_a_method_that_follows_a_bend_is_trusted_where_lines_are_not() -> None:
    """The way of a thrown stone: it is seen up to the top, and from there it comes back."""
    times = torch.tensor(EVERY, dtype=torch.float64)[:, None]
    noise_KD = noise(torch.Generator().manual_seed(0), len(EVERY), 30)
    deltas = times * (48.0 - times) * noise(torch.Generator().manual_seed(1), 30) + 1e-3 * noise_KD
    lines = backtest(gram_of(deltas[None], EVERY))
    curves = backtest(gram_of(deltas[None], EVERY), methods=["polynomial:degree=2"])
    assert curves.recommendation.method == "polynomial:degree=2"
    assert lines.recommendation.horizon == curves.recommendation.horizon


def test_json_says_of_a_way_its_method_and_what_it_was_called_by() -> None:
    content = backtest(gram_of(line(torch.Generator().manual_seed(0), EVERY, 3)[None], EVERY)).to_json()
    ways = [cell["way"] for cell in content["cells"]]
    assert {"method": "relex", "form": "relex", "damping": 1.0, "start": 0.0} in ways
    pinned = {"method": "relex-pinned:damping=0.3", "form": "relex-pinned", "damping": 0.3, "start": 0.5}
    assert pinned in ways


def test_the_cells_are_the_pooled_skill_cosine_and_norm_ratio_over_origins() -> None:
    generator = torch.Generator().manual_seed(3)
    gram = gram_of(torch.stack([line(generator, STEPS, 9), 3.0 * walk(generator, STEPS, 9)]), STEPS)
    cells = jumps(gram.products, STEPS)
    for cell in backtest(gram).cells:
        entry = cells[cell.way, cell.horizon]
        missed_O, held_O, inner_O, predicted_O, real_O = (
            part.sum(1) for part in (entry.missed, entry.held, entry.inner, entry.predicted, entry.real)
        )
        assert cell.skill == pytest.approx(float((1 - missed_O / held_O).mean()))
        assert cell.cosine == pytest.approx(float((inner_O / (predicted_O * real_O).sqrt()).mean()))
        assert cell.norm_ratio == pytest.approx(float((predicted_O / real_O).sqrt().mean()))
        assert cell.by_tensor == pytest.approx((1 - entry.missed.sum(0) / entry.held.sum(0)).tolist())


def test_the_lower_bound_counts_only_jumps_that_do_not_overlap() -> None:
    missed = torch.tensor([[0.2], [0.5], [0.3], [0.4]], dtype=torch.float64)
    ones = torch.ones_like(missed)
    jump_errors = Jumps((10, 15, 20, 40), (20, 30, 40, 80), missed, ones, ones, ones, ones)
    assert jump_errors.independent() == 3
    # Student's t of 2 degrees of freedom at 95 %, one-sided, is 2.920; the spread is that of all four, and of one more.
    assert float(jump_errors.lower_bound(80)) == pytest.approx(
        0.65 - 2.919986 * 0.1290994 * (1 + 1 / 3) ** 0.5, rel=1e-5
    )
    overlapping = replace(jump_errors, targets=(100, 100, 100, 100))
    assert float(overlapping.lower_bound(80)) == -torch.inf


def test_the_lower_bound_goes_on_with_the_steepest_decline() -> None:
    missed = torch.tensor([[0.10], [0.11], [0.12]], dtype=torch.float64)
    ones = torch.ones_like(missed)
    jump_errors = Jumps((10, 20, 40), (20, 40, 80), missed, ones, ones, ones, ones)
    # By .01 each time the steps double, from .88: to 640 they double four times.
    assert float(jump_errors.lower_bound(640)) == pytest.approx(0.84)
    risen = replace(jump_errors, missed=missed.flip(0))
    assert float(risen.lower_bound(640)) == float(risen.lower_bound(80)) > 0.84


@pytest.mark.parametrize("size", [1, 3, 30])
def test_on_a_random_walk_it_says_hold(size: int) -> None:
    assert hold_share(walk, FEW, size, runs=50) >= 0.95


@pytest.mark.parametrize(("steps", "size"), [(FEW, 3), (FEW, 30), (STEPS, 30)])
def test_on_a_straight_drift_with_noise_it_finds_skill(steps: Sequence[int], size: int) -> None:
    assert hold_share(line, steps, size, runs=25) <= 0.05


def share_directed(path: Path, steps: Sequence[int], size: int, *, runs: int) -> float:
    """Return how often, of `runs`, the run is said to have a direction."""
    result = 0
    for seed in range(runs):
        deltas = path(torch.Generator().manual_seed(seed), steps, size)
        chance = share_as_far(deltas @ deltas.mT, seed=0)
        result += chance is not None and chance <= 0.025
    return result / runs


def test_a_random_walk_has_a_direction_once_in_forty() -> None:
    """Level .025; of 400 runs three standard errors are .023. One dimension shows it worst."""
    for size in (1, 30):
        assert share_directed(walk, FEW, size, runs=400) <= 0.025 + 0.023


def test_a_slight_drift_is_seen_by_how_far_the_run_came() -> None:
    """One dimension, a drift of .8 of a step's deviation, 12 steps: .55 of 400 runs, ± .025.

    The best of many bounds, judged in the same way, saw .30 of 60.
    """

    def drift(generator: torch.Generator, steps: Sequence[int], size: int) -> Tensor:
        times = torch.tensor(steps, dtype=torch.float64)[:, None]
        return walk(generator, steps, size) + 0.8 / math.sqrt(3) * times

    assert share_directed(drift, FEW, 1, runs=400) >= 0.47


def test_a_direction_alone_is_not_trusted_unless_it_beats_to_hold_for_sure() -> None:
    """A slight drift among much wandering: the run has a direction, and no way along it is sure to be nearer."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.tensor(EVERY, dtype=torch.float64)
    wander, direction = walk(generator, EVERY, 3000), noise(generator, 3000)
    drift = 0.3 * torch.outer(steps / EVERY[-1] ** 0.5, direction * 3000**0.5 / direction.norm())
    convergence = backtest(gram_of((wander + drift)[None], EVERY))
    assert convergence.chance == 0.0025
    assert all(cell.trusted == ((cell.lower_bound or 0.0) > 0) for cell in convergence.cells)
    assert any((cell.lower_bound or 0.0) < 0 < cell.skill for cell in convergence.cells)


@pytest.mark.parametrize("seed", [0, 2, 4])
def test_a_way_whose_latest_jump_is_worse_than_its_bound_is_not_trusted(seed: int) -> None:
    """A straight run that turns round near its end: the mean over origins does not see it."""
    deltas = line(torch.Generator().manual_seed(seed), EVERY, 12)
    deltas[20:] -= 2 * (deltas[20:] - deltas[19])
    gram = gram_of(deltas[None], EVERY)
    made = jumps(gram.products, EVERY)
    fell = 0
    for cell in backtest(gram).cells:
        skill_O = made[cell.way, cell.horizon].pooled().skill()[:, 0]
        if cell.lower_bound is not None:
            assert cell.lower_bound <= float(skill_O[-1])
            fell += float(skill_O[-1]) <= 0 < float(skill_O.mean())
        assert not cell.trusted or float(skill_O[-1]) > 0
    assert fell > 0


def test_what_is_trusted_of_a_run_that_bends_away_falls_short_less_often() -> None:
    """Saturating with a time as long as the steps seen, 20 runs; what no bound from inside can see stays.

    A bound of the mean of past jumps is broken by .21 of what it trusts here.
    """
    later = range(1, 73)
    times = torch.tensor(later, dtype=torch.float64)[:, None]
    trusted = short = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        direction = noise(generator, 30)
        deltas = 24 * (1 - torch.exp(-times / 24)) * direction / direction.norm()
        deltas = deltas + 1.2 / math.sqrt(30) * noise(generator, len(later), 30)
        for cell in backtest(gram_of(deltas[None, :24], later[:24])).cells:
            target = round(24 * (1 + cell.horizon))
            if cell.trusted and target in later:
                rows = [row for row in range(24) if later[row] >= cell.way.start * 24]
                window_W = torch.tensor([later[row] for row in rows], dtype=torch.float64)
                seen = Window((deltas[rows] @ deltas[rows].mT)[None], window_W)
                made = parse_method(cell.way.method).predictor.coefficients(seen, target)[0] @ deltas[rows]
                missed, held = (float((each - deltas[target - 1]).norm()) ** 2 for each in (made, deltas[23]))
                trusted += 1
                short += 1 - missed / held < (cell.lower_bound or 0.0)
    assert trusted > 100
    # Measured .14; three standard errors of runs that are 20, not cells, are .07.
    assert short / trusted <= 0.18


def test_a_target_is_no_further_than_a_jump_that_was_tested() -> None:
    deltas = line(torch.Generator().manual_seed(0), EVERY, 30)[None]
    convergence = backtest(gram_of(deltas, EVERY))
    advice = convergence.recommendation
    assert advice.way is not None
    assert advice.horizon is not None
    assert advice.target_step is not None
    cell = next(each for each in convergence.cells if (each.way, each.horizon) == (advice.way, advice.horizon))
    assert cell.trusted
    assert advice.target_step == EVERY[-1] + cell.longest < EVERY[-1] * (1 + advice.horizon)
    assert f"No jump longer than {cell.longest} steps was tested" in advice.reason
    assert f"beyond step {advice.target_step}" in advice.reason
    # Trusted nearer by are others, with a higher bound.
    trusted = [each for each in convergence.cells if each.trusted]
    assert advice.horizon == max(each.horizon for each in trusted)
    assert (cell.lower_bound or 0.0) < max(each.lower_bound or 0.0 for each in trusted)
    late = replace(cell, way=Way("relex", 0.5))
    recommended = module._recommend(gram_of(deltas, EVERY), (late,), convergence.chance)
    assert recommended.start == 12 == EVERY[-1] / 2


def test_the_unit_of_a_step_changes_nothing_but_the_target() -> None:
    deltas = line(torch.Generator().manual_seed(1), EVERY, 30)[None]
    once, tenfold = (backtest(gram_of(deltas, [scale * step for step in EVERY])).recommendation for scale in (1, 10))
    assert (once.way, once.horizon) == (tenfold.way, tenfold.horizon)
    assert once.target_step is not None
    assert tenfold.target_step == 10 * once.target_step


def test_a_run_that_curls_up_on_itself_is_not_extrapolated() -> None:
    """A circle that is closed in 12 steps: the pattern is perfect, and no line foretells it."""
    angle = torch.tensor(EVERY, dtype=torch.float64) * torch.pi / 6
    deltas = torch.stack([angle.sin(), 1 - angle.cos()], dim=1) + 0.01 * noise(torch.Generator().manual_seed(0), 24, 2)
    assert backtest(gram_of(deltas[None], EVERY)).recommendation.method == "hold"


def test_a_tensor_that_stood_still_has_no_skill_and_spoils_none() -> None:
    deltas = line(torch.Generator().manual_seed(0), EVERY, 30)
    alone = backtest(gram_of(deltas[None], EVERY))
    beside = backtest(gram_of(torch.stack([deltas, torch.zeros_like(deltas)]), EVERY))
    assert beside.recommendation == alone.recommendation
    assert {cell.by_tensor[1] for cell in beside.cells} == {None}
    assert [cell.by_tensor[0] for cell in beside.cells] == pytest.approx([cell.by_tensor[0] for cell in alone.cells])


@pytest.mark.parametrize("count", [2, 3, 6])
def test_too_few_checkpoints_are_held_whatever_they_look_like(count: int) -> None:
    steps = EVERY[:count]
    advice = backtest(gram_of(line(torch.Generator().manual_seed(0), steps, 30)[None], steps)).recommendation
    assert (advice.method, advice.way, advice.horizon, advice.target_step) == ("hold", None, None, None)
    assert f"{count} checkpoints, steps 1 to {count}: too few to tell a direction from chance" in advice.reason


def test_a_checkpoint_saved_twice_is_refused() -> None:
    gram = gram_of(line(torch.Generator().manual_seed(0), EVERY, 3)[None], EVERY)
    with pytest.raises(DuplicateError, match="step 2 holds the same weights as that of step 1"):
        backtest(replace(gram, digests=(gram.digests[0], *gram.digests[:-1])))
