"""Climbing: what is written and scored, where a direction ends, and what a decision by it says and costs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest

from flows.decide.page import page
from flows.errors import WindowError
from flows.search.ladder import Answered, Ladder, climb, falls
from flows.state.decision import Model, Score
from relex.backtest.convergence import Proposal
from tests.helpers.simulated import World

STEPS = (54, 56, 60, 72, 96, 144, 240, 432)


def answered(model: Model, right: int, of: int = 100) -> Answered:
    score = Score(model, "selection", right / of, 0.0, of, answers=of)
    return Answered(score, (1.0,) * right + (0.0,) * (of - right))


OBSERVED = answered(Model("observed", 48, "observed"), 50)


def climbed(
    rights: Mapping[str, Sequence[int]], *, lost_after: int | None = None
) -> tuple[Ladder, list[list[tuple[str, int]]]]:
    """Climb directions whose rungs have so many problems right; return the ladder, and what was written at a time."""
    passes: list[list[tuple[str, int]]] = []
    proposals = [Proposal(method, step, None) for method, right in rights.items() for step in STEPS[: len(right)]]

    def write(due: list[Proposal]) -> list[Model]:
        if lost_after is not None and len(passes) >= lost_after:
            raise WindowError("the window is gone")
        passes.append([(proposal.method, proposal.target_step) for proposal in due])
        return [Model("candidate", proposal.target_step, "", proposal.method) for proposal in due]

    def answer(model: Model) -> Answered:
        return answered(model, rights[model.method][STEPS.index(model.step)])

    return climb(proposals, observed=OBSERVED, write=write, answer=answer), passes


def reached(ladder: Ladder, method: str) -> int:
    return max(rung.step for rung in ladder.rungs if rung.method == method)


def test_a_direction_ends_after_two_rungs_that_are_worse_and_what_lies_beyond_is_never_written() -> None:
    ladder, passes = climbed({"relex": [52, 55, 60, 70, 40, 30, 90, 95]})
    assert [rung.worse for rung in ladder.rungs] == [False, False, False, False, True, True]
    assert reached(ladder, "relex") == 144
    assert {step for batch in passes for _, step in batch} == set(STEPS[:6])


def test_one_bad_rung_or_two_apart_end_nothing() -> None:
    ladder, _ = climbed({"relex": [52, 30, 55, 30, 60, 30, 80, 20]})
    assert reached(ladder, "relex") == STEPS[-1]
    assert [rung.worse for rung in ladder.rungs].count(True) == 4


def test_a_rung_that_is_lower_by_chance_is_not_worse() -> None:
    ladder, _ = climbed({"relex": [52, 49, 49, 49, 49, 49, 49, 49]})
    assert not any(rung.worse for rung in ladder.rungs)


def test_directions_climb_by_themselves_and_are_written_in_one_pass() -> None:
    ladder, passes = climbed({"relex": [40, 30, 20, 10], "secant": [60, 70, 80, 90]})
    assert reached(ladder, "relex") == 56
    assert reached(ladder, "secant") == 72
    # Two rungs end a direction at the earliest, so that two at a time waste nothing.
    assert passes == [[("relex", 54), ("relex", 56), ("secant", 54), ("secant", 56)], [("secant", 60), ("secant", 72)]]


def test_staying_is_the_best_of_a_direction_that_begins_with_a_fall() -> None:
    ladder, _ = climbed({"relex": [30, 31, 90]})
    assert reached(ladder, "relex") == 56


def test_a_window_that_the_store_loses_ends_the_ladder_where_it_is() -> None:
    ladder, _ = climbed({"relex": [52, 55, 60, 70]}, lost_after=1)
    assert [rung.step for rung in ladder.rungs] == [54, 56]
    assert ladder.ended == "the window is gone"
    with pytest.raises(WindowError):
        climbed({"relex": [52]}, lost_after=0)


def test_worse_is_paired_problem_by_problem() -> None:
    best = (1.0,) * 50 + (0.0,) * 50
    # Six lost and none won: 6 points, 2.5 standard errors of the difference, .8 of two independent samples.
    assert falls((0.0,) * 6 + best[6:], best)
    # As many points on more changes say less.
    assert not falls((0.0,) * 12 + (1.0,) * 44 + (0.0,) * 44, best)
    assert not falls(best, best)


ARC = (0.0, 0.02, 0.05, 0.1, 0.15, 0.1, -0.1, -0.3, -0.5, -0.55, -0.59, -0.59)


def test_a_decision_climbs_to_the_top_and_pays_each_answer_once() -> None:
    world = World(ARC, selection=500, gate=3000, margin=0.0, seed=1, climbed=True)
    decision = world.decide()
    assert decision.verdict == "registered"
    assert decision.winner is not None
    assert world.differences[decision.winner] >= 0.1
    # Neither written nor scored beyond two falls.
    assert len(world.written) == len(set(world.written)) < len(ARC)
    assert {rung.step for rung in decision.ladder} == {model.step for model in world.written}
    answers, _ = decision.cost
    assert answers == sum(world.asked.values()) < 0.7 * 500 * (1 + len(world.written))
    text = page(decision, world.settings)
    assert f"Choosing cost {answers:,} answers" in text
    assert text.count(" ↓ |") == sum(rung.worse for rung in decision.ladder)


def test_a_run_that_only_falls_is_kept_training_with_its_rungs_told() -> None:
    world = World((-0.3, -0.4, -0.5), selection=500, gate=500, margin=0.0, seed=1, climbed=True)
    decision = world.decide()
    assert decision.verdict == "keep training"
    assert decision.reason == "Every rung of the ladder is worse than the last observed step 48."
    assert [rung.worse for rung in decision.ladder] == [True, True]
    assert "## Ladder" in page(decision, world.settings)
    # A decision of an earlier version has no ladder, and its page none.
    assert "## Ladder" not in page(replace(decision, ladder=()), world.settings)
