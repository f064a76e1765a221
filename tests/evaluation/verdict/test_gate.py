import dataclasses
import json
from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import TypeAdapter
from scipy import stats

from evaluation.errors import ComparisonError
from evaluation.verdict.bounds import paired_bounds
from evaluation.verdict.gate import Gate, gate
from evaluation.verdict.report import Report, Setting


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


@pytest.mark.parametrize(
    ("wins", "losses", "n", "margin"), [(60, 30, 500, 0.0), (60, 70, 500, 0.02), (3, 6, 150, 0.05)]
)
def test_right_or_wrong_scores_are_judged_by_the_score_bound(wins: int, losses: int, n: int, margin: float) -> None:
    # Tango's statistic with the share of losses found by maximising the likelihood on a grid, not by the formula.
    decision = gate(*paired(wins, losses, n), margin=margin)
    bound = decision.lower_bound
    share = np.linspace(max(0.0, -bound) + 1e-7, 0.5 - max(0.0, bound) / 2 - 1e-7, 500_001)
    same = n - wins - losses
    likelihood = wins * np.log(share + bound) + losses * np.log(share) + same * np.log(1 - 2 * share - bound)
    best = share[np.argmax(likelihood)]
    statistic = ((wins - losses) - n * bound) / np.sqrt(n * (2 * best + bound * (1 - bound)))
    assert decision.method == "Tango score"
    assert statistic == pytest.approx(stats.norm.ppf(0.95), abs=1e-3)


def test_averaged_scores_are_judged_by_a_t_bound_corrected_for_skewness() -> None:
    scores = np.random.default_rng(1).beta(0.5, 2.0, size=300)
    decision = gate(report(scores.tolist()), report([0.1] * 300, "/models/reference"), margin=0.0)
    # Hall's transformation of the t statistic at the bound is the quantile.
    skewness = stats.skew(scores)
    t = np.sqrt(300) * (scores.mean() - 0.1 - decision.lower_bound) / scores.std(ddof=1)
    part = skewness / np.sqrt(300)
    assert decision.method == "Hall's t"
    assert t + part * t**2 / 3 + part**2 * t**3 / 27 + part / 6 == pytest.approx(stats.t.ppf(0.95, 299))


@pytest.mark.parametrize(("wins", "losses"), [(4, 0), (5, 0), (9, 2), (10, 2), (15, 7), (16, 7), (0, 3)])
def test_few_discordant_problems_are_judged_as_the_exact_mcnemar_test_would(wins: int, losses: int) -> None:
    decision = gate(*paired(wins, losses, 400), margin=0.0)
    p_value = stats.binomtest(wins, wins + losses, alternative="greater").pvalue
    assert decision.method == "exact McNemar"
    assert decision.passed == (p_value < 0.05)


@pytest.mark.parametrize(("n", "margin", "passed"), [(40, 0.05, False), (58, 0.05, False), (59, 0.05, True)])
def test_equal_scores_decide_nothing_until_there_are_three_times_one_over_the_margin(
    n: int, margin: float, passed: bool
) -> None:
    decision = gate(report([1.0] * n), report([1.0] * n), margin=margin)
    assert decision.method == "no variance, rule of three"
    assert decision.passed == passed


@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_a_bound_that_is_the_margin_itself_shows_nothing(margin: float, monkeypatch: pytest.MonkeyPatch) -> None:
    reports = paired(60, 30, 500)
    there = paired_bounds(*([score for _, score in each.scores] for each in reports), margin=margin, confidence=0.95)
    assert gate(*reports, margin=margin).passed
    monkeypatch.setattr(
        "evaluation.verdict.gate.paired_bounds", lambda *_, **__: dataclasses.replace(there, lower_bound=-margin)
    )
    assert not gate(*reports, margin=margin).passed


@pytest.mark.parametrize(("wins", "losses"), [(0, 4), (0, 5), (2, 9), (2, 10), (30, 60)])
@pytest.mark.parametrize("margin", [0.0, 0.02])
def test_what_is_worse_is_said_where_the_other_would_be_shown_to_be_better(
    wins: int, losses: int, margin: float
) -> None:
    decision = gate(*paired(wins, losses, 400), margin=margin)
    if margin == 0:
        ours, theirs = paired(wins, losses, 400)
        assert (decision.verdict == "worse") == gate(theirs, ours, margin=0.0).passed
    else:
        assert decision.verdict == ("worse" if losses == 60 else "not shown")
    assert not decision.passed


def test_rounding_is_no_variance() -> None:
    ours, theirs = [0.7] * 4 + [0.4] * 4, [0.4] * 4 + [0.1] * 4
    assert 0.7 - 0.4 != 0.4 - 0.1
    assert gate(report(ours), report(theirs), margin=0.0).method == "no variance, rule of three"


def test_equal_scores_never_show_that_a_candidate_is_better() -> None:
    assert not gate(report([0.5] * 100_000), report([0.5] * 100_000), margin=0.0).passed


def test_the_sentence_has_the_numbers_and_says_whether_more_problems_would_help() -> None:
    decision = gate(*paired(20, 24, 500), margin=0.01)
    assert decision.sentence == (
        "On 500 problems of plus, /models/candidate scores 0.9520 and /models/reference 0.9600: "
        "the difference is -0.80 points, with 95 % confidence at least -3.05 (Tango score); not shown: "
        "the interval -3.51 to +1.87 points includes the margin -1.00; "
        "about 150,000 more problems would show it with 80 % probability if it stays as it is."
    )
    worse = gate(*paired(6, 30, 500), margin=0.01).sentence
    assert worse.endswith(
        "; it is worse: with 95 % confidence the difference is at most -2.95 points, beyond the margin -1.00."
    )
    level = gate(*paired(5, 5, 500), margin=0.0).sentence
    assert "points includes 0; the difference points the wrong way" in level
    assert gate(*paired(30, 30, 500), margin=0.05).sentence.endswith("; a loss of 5 points is ruled out: passed.")
    assert gate(*paired(90, 30, 500), margin=0.0).sentence.endswith("; it is better: passed.")


def test_what_would_settle_it_is_said_only_of_what_is_not_shown() -> None:
    assert gate(*paired(90, 30, 500), margin=0.0).needed is None
    assert gate(*paired(6, 30, 500), margin=0.01).needed is None
    decision = gate(report([1.0] * 40), report([1.0] * 40), margin=0.05)
    assert decision.needed == 59
    assert "about 19 more problems would show it" in decision.sentence


def test_several_comparisons_on_the_same_problems_share_the_error() -> None:
    pair = paired(60, 40, 500)
    once, thrice = gate(*pair, margin=0.0), gate(*pair, margin=0.0, comparisons=3)
    alone = gate(*pair, margin=0.0, confidence=1 - 0.05 / 3)
    assert (once.passed, thrice.passed) == (True, False)
    assert thrice.lower_bound == alone.lower_bound < once.lower_bound
    assert (thrice.interval_low, thrice.interval_high) == (alone.interval_low, alone.interval_high)
    assert thrice.confidence == 0.95
    assert (
        "with 98.33 % confidence at least -0.26 (Tango score, 95 % over 3 comparisons: 98.33 % each); not shown"
    ) in thrice.sentence


def test_a_gate_that_an_earlier_version_wrote_is_read_and_told() -> None:
    fields = dataclasses.asdict(gate(*paired(20, 24, 500), margin=0.01))
    for name in ("comparisons", "interval_low", "interval_high", "wins", "losses", "needed"):
        del fields[name]
    old = TypeAdapter(Gate).validate_python(fields)
    assert not old.passed
    assert old.sentence.endswith("(Tango score); not shown: the lower bound is not above the margin -1.00.")


def test_a_gate_survives_json() -> None:
    decision = gate(*paired(20, 24, 500), margin=0.01, comparisons=2)
    read = TypeAdapter(Gate).validate_python
    fields = json.loads(json.dumps(dataclasses.asdict(decision)))
    assert read(fields) == decision
    # Its key in the decisions of earlier versions.
    fields["looks"] = fields.pop("comparisons")
    assert read(fields) == decision


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
    with pytest.raises(ComparisonError, match="comparisons is 0 and must be at least 1"):
        gate(*pair, margin=0.0, comparisons=0)
    with pytest.raises(ComparisonError, match="has 1 problem"):
        gate(report([1]), report([1]), margin=0.0)
