"""The backtest on two real GRPO runs, against the checkpoints that came later.

`NAME.safetensors` holds the Gram of some checkpoints of a run of 480 steps, `NAME.json` the accuracies measured on it,
both written by benchmarks/decisions.py --keep. The straight run goes on along its line; the bent one has learnt nearly
everything after a fifth of its steps, and plain RELEX to its end unlearns it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from relex.backtest.backtest import Backtest, backtest
from relex.gram import Gram
from relex.predictors import parse_method
from relex.predictors.predictor import Window
from relex.sanity import foreign

STRAIGHT, BENT = "sort-seed-1-prompts-8-lr-4e-06-fp32", "sort-seed-1-prompts-32-lr-2e-05-fp32"
WINDOWS = (24, 48, 96)
END = 480


@dataclass(frozen=True)
class Kept:
    """A run that was: its Gram, and for each window what was scored."""

    gram: Gram
    windows: dict[int, dict[str, Any]]

    def backtest(self, window: int) -> Backtest:
        return backtest(self.gram.rows([row for row, step in enumerate(self.gram.steps) if step <= window]))

    def skill(self, method: str, start: int, window: int, target: int) -> float:
        """Return the true skill against holding the last checkpoint of the window, by the quadratic form."""
        steps = self.gram.steps
        rows = [row for row, step in enumerate(steps) if start <= step <= window]
        real, last = steps.index(target), rows[-1]
        observed = torch.tensor([steps[row] for row in rows], dtype=torch.float64)
        missed_TK = torch.zeros(len(self.gram.names), len(steps), dtype=torch.float64)
        missed_TK[:, rows] = parse_method(method).predictor.coefficients(
            Window(self.gram.products[:, rows][:, :, rows], observed), target
        )
        missed_TK[:, real] -= 1.0
        held_K = torch.zeros(len(steps), dtype=torch.float64)
        held_K[last], held_K[real] = 1.0, -1.0
        missed = torch.einsum("tk,tkl,tl->", missed_TK, self.gram.products, missed_TK)
        held = torch.einsum("k,tkl,l->", held_K, self.gram.products, held_K)
        return 1.0 - float(missed / held)


def read(name: str) -> Kept:
    path = Path(__file__).parent / "runs" / f"{name}.safetensors"
    with safe_open(path, framework="pt") as file:
        content = json.loads(file.metadata()["relex"])
        lower, base_norms = file.get_tensor("lower"), file.get_tensor("base_norms")
    count = len(content["steps"])
    products = torch.zeros(len(content["names"]), count, count, dtype=torch.float64)
    rows, columns = torch.tril_indices(count, count)
    products[:, rows, columns] = products[:, columns, rows] = lower
    digests = tuple(content["digests"])
    gram = Gram(
        tuple(content["steps"]),
        tuple(content["names"]),
        products,
        base_norms,
        content["base_digest"],
        digests,
        digests,
    )
    measured = json.loads(path.with_suffix(".json").read_text())
    return Kept(gram, {row["window"]: row for row in measured["windows"]})


@pytest.fixture(scope="module")
def runs() -> dict[str, Kept]:
    return {name: read(name) for name in (STRAIGHT, BENT)}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", [STRAIGHT, BENT])
def test_what_is_recommended_came_nearer_to_the_real_checkpoint_than_the_last_observed(
    runs: dict[str, Kept], name: str, window: int
) -> None:
    advice = runs[name].backtest(window).recommendation
    assert advice.target_step is not None
    assert advice.target_step > 1.3 * window
    assert runs[name].skill(advice.method, advice.start, window, advice.target_step) > 0.25


# After 96 steps the bent run has just turned: what every earlier origin says for a jump is no longer so, and not every
# cell that is trusted there is right.
@pytest.mark.parametrize(("name", "window"), [*((STRAIGHT, window) for window in WINDOWS), (BENT, 24), (BENT, 48)])
def test_every_way_that_is_trusted_came_nearer_than_the_last_observed(
    runs: dict[str, Kept], name: str, window: int
) -> None:
    run = runs[name]
    trusted = [cell for cell in run.backtest(window).cells if cell.trusted]
    assert trusted
    for cell in trusted:
        start = next(step for step in run.gram.steps if step >= cell.way.start * window)
        target = next(step for step in run.gram.steps if step >= (1.0 + cell.horizon) * window)
        assert run.skill(cell.way.method, start, window, target) > 0.0, (cell.way, target)


@pytest.mark.parametrize("window", WINDOWS)
def test_a_run_that_bends_is_not_trusted_to_its_end(runs: dict[str, Kept], window: int) -> None:
    run = runs[BENT]
    measured = next(point for point in run.windows[window]["relex"] if point["step"] == END)
    assert measured["observed_is_better"]
    assert measured["accuracy"] < run.windows[window]["observed"] - 0.5
    assert run.skill("relex", run.gram.steps[0], window, END) < -1.0
    advice = run.backtest(window).recommendation
    assert advice.target_step is not None
    assert advice.target_step < END / 2


@pytest.mark.parametrize("window", WINDOWS)
def test_a_run_that_goes_on_is_foretold_to_its_end(runs: dict[str, Kept], window: int) -> None:
    run = runs[STRAIGHT]
    measured = next(point for point in run.windows[window]["relex"] if point["step"] == END)
    assert measured["accuracy"] > run.windows[window]["observed"] + 0.3
    assert run.skill("relex", run.gram.steps[0], window, END) > 0.3


@pytest.mark.parametrize(("name", "window"), [(STRAIGHT, 48), (BENT, 96)])
def test_the_cells_of_the_usual_ways_are_those_that_were_kept(runs: dict[str, Kept], name: str, window: int) -> None:
    """A digest of what decides on real runs; the bounds are those of the next jump."""
    kept = json.loads((Path(__file__).parent / "runs" / "cells.json").read_text())[f"{name} {window}"]
    made = runs[name].backtest(window)
    assert made.chance == pytest.approx(kept["chance"], rel=1e-12)
    assert len(made.cells) == len(kept["cells"])
    for cell, expected in zip(made.cells, kept["cells"], strict=True):
        assert [cell.way.method, cell.way.start, cell.horizon] == expected[:3]
        numbers = [cell.skill, cell.lower_bound, cell.cosine, cell.norm_ratio, cell.jumps, cell.longest, cell.trusted]
        for number, value in zip(numbers, expected[3:], strict=True):
            assert number == (None if value is None else pytest.approx(value, rel=1e-12)), (cell.way, cell.horizon)


@pytest.mark.parametrize(("name", "most"), [(STRAIGHT, 0.0), (BENT, 0.33)])
def test_what_is_said_of_the_next_jump_came_true_as_often_as_the_pages_say(
    runs: dict[str, Kept], name: str, most: float
) -> None:
    """Of all that is trusted at every step from 24 to 200: on the run that bends a bound of the mean was .42 short."""
    run, trusted, short = runs[name], 0, 0
    for window in [step for step in run.gram.steps if 24 <= step <= 200][::3]:
        for cell in run.backtest(window).cells:
            target = next((step for step in run.gram.steps if step >= (1.0 + cell.horizon) * window), None)
            if cell.trusted and target is not None:
                start = next(step for step in run.gram.steps if step >= cell.way.start * window)
                trusted += 1
                short += run.skill(cell.way.method, start, window, target) < (cell.lower_bound or 0.0)
    assert trusted > 100
    assert short / trusted <= most


@pytest.mark.parametrize("name", [STRAIGHT, BENT])
def test_no_step_of_a_real_run_is_taken_for_another_runs(runs: dict[str, Kept], name: str) -> None:
    measured = runs[name].gram
    count = len(measured.steps)
    for stride in (1, 2, 3, 6):
        for first in range(0, count, 3):
            for last in range(first + 4 * stride, count, 5):
                assert foreign(measured.rows(range(first, last + 1, stride))) == [], (stride, first, last)
