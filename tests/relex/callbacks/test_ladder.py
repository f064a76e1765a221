"""The ladder: which rungs are scored, which is kept, and how often one is kept that gains nothing."""

from typing import Any

import numpy as np
import pytest

from relex.callbacks.ladder import LEVEL, PATIENCE, Scores, chance_of_gain, climb, rungs

STEPS = rungs(24)


def right_of_100(count: int) -> Scores:
    """A hundred problems of which the first `count` are answered rightly."""
    return (np.arange(100) < count).astype(np.float64)


def test_the_rungs_are_shares_and_multiples_of_a_block_without_repeats() -> None:
    assert STEPS[:5] == [12, 24, 36, 48, 72]
    assert STEPS[-1] == 32 * 24
    assert rungs(2) == sorted(set(rungs(2)))
    assert rungs(2)[0] == 1


def test_the_ladder_ends_after_two_rungs_that_do_not_beat_the_best_and_scores_each_once() -> None:
    right = {0: 40, 12: 60, 24: 55, 36: 70, 48: 70, 72: 69}
    asked: list[int] = []

    def score(steps: int) -> Scores:
        asked.append(steps)
        return right_of_100(right[steps])

    climbed = climb(score, STEPS)
    assert asked == [0, 12, 24, 36, 48, 72]
    assert climbed.kept == 36
    assert climbed.stay == pytest.approx(0.40)
    assert [rung.steps for rung in climbed.rungs] == asked[1:]
    assert climbed.p is not None
    assert climbed.p < 0.01


def test_a_gain_that_chance_explains_is_not_kept() -> None:
    # One problem more is right, which is as likely one less.
    climbed = climb(lambda steps: right_of_100(41 if steps else 40), STEPS)
    assert climbed.kept == 0
    assert climbed.p is not None
    assert climbed.p > LEVEL


def test_of_one_number_the_best_is_kept_when_it_is_above_staying() -> None:
    climbed = climb(lambda steps: np.array([1.0 if steps == 24 else 0.5]), STEPS)
    assert (climbed.kept, climbed.p) == (24, None)
    assert climb(lambda steps: np.array([0.5]), STEPS).kept == 0


def test_a_rung_that_is_no_model_or_has_no_score_is_not_kept_and_ends_the_ladder() -> None:
    broken = np.append(right_of_100(99), np.nan)
    for bad in (None, broken):
        climbed = climb(lambda steps, bad=bad: bad if steps else np.append(right_of_100(40), 0.0), STEPS)  # type: ignore[misc]
        assert climbed.kept == 0
        assert len(climbed.rungs) == PATIENCE


def test_a_problem_that_staying_cannot_be_scored_on_decides_nothing() -> None:
    climbed = climb(lambda steps: np.append(right_of_100(80 if steps == 12 else 40), np.nan), STEPS)
    assert climbed.kept == 12
    assert climbed.stay == pytest.approx(0.40)


def test_nothing_is_tried_when_staying_has_no_score() -> None:
    climbed = climb(lambda steps: np.array([np.nan]), STEPS)
    assert (climbed.kept, climbed.rungs) == (0, ())


def test_scores_of_other_problems_are_refused() -> None:
    with pytest.raises(
        ValueError, match="a jump of 12 steps has 99 scores and staying has 100: score the same problems"
    ):
        climb(lambda steps: right_of_100(40)[: 99 if steps else 100], STEPS)


def test_one_rung_of_right_or_wrong_answers_is_tested_as_mcnemar_does() -> None:
    # Of 10 answers that changed 8 became right: P(at least 8 of 10 heads) = 56 / 1024.
    gains = np.zeros((1, 50))
    gains[0, :10] = [1.0] * 8 + [-1.0] * 2
    assert chance_of_gain(gains) == pytest.approx(56 / 1024, abs=0.012)


def test_rungs_that_answer_alike_cost_nothing() -> None:
    gains = np.zeros((1, 50))
    gains[0, :10] = [1.0] * 8 + [-1.0] * 2
    assert chance_of_gain(np.repeat(gains, 12, axis=0)) == chance_of_gain(gains)


@pytest.mark.parametrize("shared", [0.0, 0.9])
def test_of_ladders_that_gain_nothing_no_more_than_the_level_keep_a_jump(shared: float) -> None:
    """Right or wrong answers to 60 problems, of equal chance on every rung; `shared` of them are alike on all rungs."""
    source = np.random.default_rng(5)
    kept = 0
    trials = 300
    for _ in range(trials):
        alike = source.random(60) < shared
        common = source.random(60) < 0.6

        def score(steps: int, alike: Any = alike, common: Any = common) -> Scores:
            return np.where(alike, common, source.random(60) < 0.6).astype(np.float64)

        kept += climb(score, STEPS).kept > 0
    assert kept / trials <= LEVEL + 2.6 * np.sqrt(LEVEL * (1 - LEVEL) / trials)
