from dataclasses import replace
from typing import Any

import pytest
import torch

from relex.backtest import convergence
from relex.backtest.backtest import Backtest, backtest
from relex.backtest.convergence import Convergence, converge, propose
from relex.gram import Gram
from tests.helpers.trajectories import measure, write_run

STEPS = tuple(range(4, 52, 4))


def looked(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    *,
    dtype: torch.dtype = torch.float32,
    steps: tuple[int, ...] = STEPS,
    methods: tuple[str, ...] = (),
) -> Convergence:
    """Return what three looks say of a run of one tensor: a line with noise, or a random walk."""
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    way = torch.randn(40, 50, generator=generator, dtype=torch.float64)
    states, walk = {0: {"weight": base.to(dtype)}}, torch.zeros_like(base)
    for step in steps:
        noise = torch.randn(40, 50, generator=generator, dtype=torch.float64)
        walk = walk + noise
        delta = {"line": 0.05 * step * way + 0.1 * noise, "walk": walk}[kind]
        states[step] = {"weight": (base + 0.1 * delta).to(dtype)}
    trajectory = write_run(tmp_path_factory.mktemp("run"), states).open()
    return converge(trajectory, measure(trajectory), methods=methods)


@pytest.fixture(scope="module")
def line(tmp_path_factory: pytest.TempPathFactory) -> Convergence:
    return looked(tmp_path_factory, "line")


def test_a_line_is_trusted_by_three_looks_each_a_tenth_apart(line: Convergence) -> None:
    assert line.state == "trusted"
    assert line.looks == (36, 40, 48)
    assert line.way is not None
    assert line.way.start == 0
    assert line.target_step is not None
    assert line.lower_bound is not None
    assert line.lower_bound > 0


def test_what_only_the_last_look_trusts_has_not_converged(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Seven checkpoints are the fewest the backtest answers for, so that the earlier looks say hold."""
    result = looked(tmp_path_factory, "line", steps=STEPS[:7])
    assert result.state == "unsettled"
    assert result.looks == (20, 24, 28)
    assert all(proposal.skill_at_least is None for proposal in propose(result, methods=None, targets=None))


def test_a_random_walk_is_held_and_proposes_nothing_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    result = looked(tmp_path_factory, "walk")
    assert result.state == "hold"
    assert propose(result, methods=None, targets=None) == ()
    # Who names a target gets it.
    (only,) = propose(result, methods=["raw"], targets=[100])
    assert (only.method, only.target_step, only.skill_at_least) == ("raw", 100, None)


def test_only_what_begins_at_the_first_checkpoint_is_trusted(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(gram: Gram, **settings: Any) -> Backtest:
        made = backtest(gram, **settings)
        return replace(made, cells=tuple(replace(cell, way=replace(cell.way, start=0.5)) for cell in made.cells))

    monkeypatch.setattr(convergence, "backtest", late)
    result = looked(tmp_path_factory, "line")
    assert result.state == "hold"
    assert result.reason == "only windows that begin later than the first checkpoint beat the latest checkpoint."


def test_in_16_bits_the_answer_is_hidden_and_only_scores_can_tell(tmp_path_factory: pytest.TempPathFactory) -> None:
    result = looked(tmp_path_factory, "walk", dtype=torch.bfloat16)
    assert result.state == "hidden"
    assert "16 bits" in result.reason
    assert {proposal.method for proposal in propose(result, methods=None, targets=None)} == {"relex", "secant"}


def targets(convergence: Convergence, total_steps: int | None = None) -> list[int]:
    made = propose(convergence, methods=["relex"], targets=None, total_steps=total_steps)
    return [proposal.target_step for proposal in made]


def test_jumps_grow_by_the_root_of_two_up_to_the_planned_end_however_far(line: Convergence) -> None:
    # Jumps of 12, 17, 24, … steps from step 48.
    assert targets(line, 480) == [60, 65, 72, 82, 96, 116, 144, 184, 240, 320, 432, 480]
    assert targets(line, 3000)[-2:] == [2220, 3000]
    # One that would nearly be the end is the end.
    assert targets(line, 148) == [60, 65, 72, 82, 96, 116, 148]
    assert targets(line, 49) == [49]


def test_without_a_planned_end_the_ladder_is_longer_than_any_line_holds(line: Convergence) -> None:
    made = targets(line)
    assert len(made) == 24
    assert made[-1] > 500 * 48


def test_no_two_rungs_of_a_short_window_are_one(line: Convergence) -> None:
    short = replace(line, backtest=replace(line.backtest, steps=(1, 2)))
    assert targets(short, 12) == [3, 4, 5, 6, 7, 8, 10, 12]


def test_skill_is_promised_only_as_far_as_it_was_tested(line: Convergence) -> None:
    assert line.way is not None
    assert line.target_step is not None
    proposals = propose(line, methods=[line.way.method], targets=None)
    assert any(proposal.skill_at_least is not None for proposal in proposals)
    assert all((each.skill_at_least is None) == (each.target_step > line.target_step) for each in proposals)


def test_a_method_of_the_settings_gets_skill_trust_and_targets(tmp_path_factory: pytest.TempPathFactory) -> None:
    plain = looked(tmp_path_factory, "line")
    (alone,) = {proposal.skill_at_least for proposal in propose(plain, methods=["raw"], targets=None)}
    assert alone is None
    asked = looked(tmp_path_factory, "line", methods=("raw", "next", "neural"))
    # What has no backtest, or only on demand, is proposed all the same.
    assert asked.backtest.methods == (*plain.backtest.methods, "raw")
    proposals = propose(asked, methods=["raw", "next"], targets=None)
    assert {proposal.method for proposal in proposals} == {"raw", "next"}
    assert any(proposal.skill_at_least is not None for proposal in proposals if proposal.method == "raw")
    assert all(proposal.skill_at_least is None for proposal in proposals if proposal.method == "next")


def test_a_bound_is_that_of_the_method_however_it_is_written(line: Convergence) -> None:
    (target,) = {proposal.target_step for proposal in propose(line, methods=["relex"], targets=[60])}
    bounds = [
        propose(line, methods=[spec], targets=[target])[0].skill_at_least
        for spec in ("relex-pinned:damping=1", "relex-pinned", "relex-pinned:rank=1")
    ]
    assert bounds[0] is not None
    assert bounds == [bounds[0]] * 3
