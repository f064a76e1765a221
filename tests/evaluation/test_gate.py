import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from evaluation.errors import ComparisonError
from evaluation.gate import gate
from evaluation.report import Report, Setting


def report(scores: Sequence[float], model: str = "/models/candidate") -> Report:
    settings: dict[str, Setting] = {"batch_size": 64, "temperature": 0.0}
    return Report(
        model=model,
        model_digest=model,
        benchmark="plus",
        benchmark_digest="b",
        metric="exact_match",
        scores=tuple((f"problem {number}", float(score)) for number, score in enumerate(scores)),
        rates={},
        settings=settings,
        seconds=1.0,
    )


def paired(wins: int, losses: int, n: int) -> tuple[Report, Report]:
    """Return reports on n problems, right on both sides but for the candidate's wins and losses."""
    ours = [1] * wins + [0] * losses + [1] * (n - wins - losses)
    theirs = [0] * wins + [1] * losses + [1] * (n - wins - losses)
    return report(ours), report(theirs, "/models/reference")


def share_passed(joint: Sequence[float], *, n: int, margin: float, rounds: int = 1500) -> float:
    """Return how often the gate passes when P(win), P(loss), P(tie) are `joint`."""
    random = np.random.default_rng(7)
    counts = random.multinomial(n, joint, size=rounds)
    return float(np.mean([gate(*paired(int(w), int(x), n), margin=margin).passed for w, x, _ in counts]))


@pytest.mark.parametrize(
    ("joint", "n", "margin"),
    [
        ((0.00, 0.03, 0.97), 100, 0.03),  # one-sided losses, few: a t bound passes a fifth of these
        ((0.02, 0.04, 0.94), 300, 0.02),  # few and many discordant problems both occur
        ((0.10, 0.12, 0.78), 400, 0.02),
        ((0.02, 0.02, 0.96), 200, 0.0),
        ((0.15, 0.15, 0.70), 400, 0.0),
    ],
)
def test_a_candidate_worse_by_exactly_the_margin_passes_in_at_most_one_of_twenty(
    joint: tuple[float, float, float], n: int, margin: float
) -> None:
    # Three standard errors of the simulation above 5 %; Tango's bound is itself approximate.
    assert share_passed(joint, n=n, margin=margin) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1500)


def test_graded_scores_keep_the_same_promise() -> None:
    random = np.random.default_rng(3)
    passed = []
    for _ in range(1000):
        ability = random.uniform(0.1, 0.9, size=60)
        ours, theirs = random.binomial(8, ability - 0.05) / 8, random.binomial(8, ability) / 8
        passed.append(gate(report(ours.tolist()), report(theirs.tolist()), margin=0.05).passed)
    assert 0.02 <= np.mean(passed) <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1000)


def test_a_candidate_that_is_as_good_passes_when_the_benchmark_is_large_enough() -> None:
    assert share_passed((0.05, 0.05, 0.90), n=1000, margin=0.03, rounds=300) > 0.9
    assert share_passed((0.05, 0.05, 0.90), n=100, margin=0.03, rounds=300) < 0.4


def test_many_discordant_problems_are_judged_by_the_paired_t_bound() -> None:
    candidate, reference = paired(60, 30, 500)
    decision = gate(candidate, reference, margin=0.0)
    d_N = np.array([a - b for (_, a), (_, b) in zip(candidate.scores, reference.scores, strict=True)])
    expected = stats.ttest_1samp(d_N, 0.0, alternative="greater").confidence_interval(0.95).low
    assert (decision.method, decision.passed) == ("paired t", True)
    assert decision.lower_bound == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("wins", "losses"), [(4, 0), (5, 0), (9, 2), (10, 2), (15, 7), (16, 7), (0, 3)])
def test_few_discordant_problems_are_judged_as_the_exact_mcnemar_test_would(wins: int, losses: int) -> None:
    decision = gate(*paired(wins, losses, 400), margin=0.0)
    p_value = stats.binomtest(wins, wins + losses, alternative="greater").pvalue
    assert decision.method == "exact McNemar"
    assert decision.passed == (p_value < 0.05)


def test_the_score_bound_solves_the_equation_that_defines_it() -> None:
    # Tango's statistic with the share of losses found by maximising the likelihood on a grid, not by the formula.
    wins, losses, n = 3, 6, 150
    bound = gate(*paired(wins, losses, n), margin=0.05).lower_bound
    share = np.linspace(max(0.0, -bound) + 1e-7, 0.5, 2_000_001)
    likelihood = wins * np.log(share + bound) + losses * np.log(share) + (n - 9) * np.log(1 - 2 * share - bound)
    best = share[np.argmax(likelihood)]
    statistic = ((wins - losses) - n * bound) / np.sqrt(n * (2 * best + bound * (1 - bound)))
    assert statistic == pytest.approx(stats.norm.ppf(0.95), abs=1e-3)


@pytest.mark.parametrize(("n", "margin", "passed"), [(40, 0.05, False), (58, 0.05, False), (59, 0.05, True)])
def test_equal_scores_decide_nothing_until_there_are_three_times_one_over_the_margin(
    n: int, margin: float, passed: bool
) -> None:
    decision = gate(report([1.0] * n), report([1.0] * n), margin=margin)
    assert decision.method == "no variance, rule of three"
    assert decision.passed == passed


def test_rounding_is_no_variance() -> None:
    ours, theirs = [0.7] * 4 + [0.4] * 4, [0.4] * 4 + [0.1] * 4
    assert 0.7 - 0.4 != 0.4 - 0.1
    assert gate(report(ours), report(theirs), margin=0.0).method == "no variance, rule of three"


def test_equal_scores_never_show_that_a_candidate_is_better() -> None:
    assert not gate(report([0.5] * 100_000), report([0.5] * 100_000), margin=0.0).passed


def test_the_sentence_has_the_numbers() -> None:
    decision = gate(*paired(6, 30, 500), margin=0.01)
    assert decision.sentence == (
        "On 500 problems of plus, /models/candidate scores 0.9400 and /models/reference 0.9880: "
        "the difference is -0.0480, with 0.95 confidence at least -0.0675 (paired t); "
        "a loss of 0.01 or more is not ruled out: not shown."
    )
    assert "it is better: passed." in gate(*paired(90, 30, 500), margin=0.0).sentence


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"benchmark": "minus"}, "benchmark is plus for .* and minus for"),
        ({"benchmark_digest": "c"}, "benchmark_digest is b for .* and c for"),
        ({"metric": "acc"}, "metric is exact_match for .* and acc for"),
        ({"settings": {"batch_size": 32, "temperature": 0.0}}, "setting batch_size is 64 for .* and 32 for"),
        ({"scores": (("problem 1", 1.0), ("problem 0", 1.0))}, "not the same ones in the same order"),
        ({"scores": (("problem 0", 1.0),)}, "has 2 problems of plus and .* 1, not the same"),
        ({"scores": (("problem 0", 1.0), ("problem 1", 7.5))}, r"from 1\.0 to 7\.5 and they must be in 0\.\.1"),
    ],
)
def test_reports_that_cannot_be_paired_are_refused(changed: dict[str, object], message: str) -> None:
    candidate = report([1, 0])
    reference: Report = dataclasses.replace(report([1, 1], "/models/reference"), **changed)  # type: ignore[arg-type]
    with pytest.raises(ComparisonError, match=message):
        gate(candidate, reference, margin=0.0)


def test_meaningless_demands_are_refused() -> None:
    pair = paired(1, 1, 10)
    with pytest.raises(ComparisonError, match=r"margin is -0\.1 and must be"):
        gate(*pair, margin=-0.1)
    with pytest.raises(ComparisonError, match="confidence is 95 and must be"):
        gate(*pair, margin=0.0, confidence=95)
    with pytest.raises(ComparisonError, match="has 1 problem"):
        gate(report([1]), report([1]), margin=0.0)
