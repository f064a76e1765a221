"""Simulated coverage: what a bound promises, counted over problems drawn many times."""

import functools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats

from evaluation.verdict.bounds import PairedBounds, interval_name, mean_interval, mean_lower_bound, paired_bounds

Scores = npt.NDArray[np.float64]
REPEATS = 4
ROUNDS = 1500


@functools.cache
def bounds(wins: int, losses: int, n: int, margin: float, confidence: float = 0.95) -> PairedBounds:
    """Return the bounds for models that are right on all problems but the other's wins."""
    ours = [1.0] * wins + [0.0] * losses + [1.0] * (n - wins - losses)
    theirs = [0.0] * wins + [1.0] * losses + [1.0] * (n - wins - losses)
    return paired_bounds(ours, theirs, margin=margin, confidence=confidence)


def slack(level: float, rounds: int = ROUNDS) -> float:
    """Return three standard errors of a simulated share."""
    return 3 * math.sqrt(level * (1 - level) / rounds)


@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 3])
@pytest.mark.parametrize(
    ("joint", "n", "margin"),
    [
        ((0.00, 0.03, 0.97), 100, 0.03),  # one-sided losses, few: a t bound passes a fifth of these
        ((0.02, 0.04, 0.94), 300, 0.02),  # few and many discordant problems both occur
        ((0.10, 0.12, 0.78), 300, 0.02),
        ((0.02, 0.02, 0.96), 200, 0.0),
        ((0.12, 0.12, 0.76), 250, 0.0),
        ((0.0, 0.08, 0.92), 400, 0.08),  # one-sided losses, many: a t bound passes .079, and .035 at .0167 (exactly)
    ],
)
def test_right_or_wrong_scores_keep_the_promise(
    joint: tuple[float, float, float], n: int, margin: float, confidence: float
) -> None:
    truth, level = joint[0] - joint[1], 1 - confidence
    counts = np.random.default_rng(7).multinomial(n, joint, size=ROUNDS)
    rounds = [bounds(int(wins), int(losses), n, margin, confidence) for wins, losses, _ in counts]
    # Worse by exactly the margin, or not better: passing is the error that is bounded.
    assert np.mean([each.lower_bound > -margin + 1e-12 for each in rounds]) <= level + slack(level)
    inside = [each.interval[0] - 1e-12 <= truth <= each.interval[1] + 1e-12 for each in rounds]
    assert np.mean(inside) >= confidence - slack(level)
    assert all(each.interval[0] <= each.lower_bound <= each.difference <= each.interval[1] for each in rounds)


@pytest.mark.parametrize("joint", [(0.03, 0.00, 0.97), (0.06, 0.02, 0.92), (0.0, 0.03, 0.97), (0.1, 0.3, 0.6)])
def test_the_number_given_beside_an_exact_test_is_a_bound_too(joint: tuple[float, float, float]) -> None:
    counts = np.random.default_rng(11).multinomial(100, joint, size=ROUNDS)
    rounds = [bounds(int(wins), int(losses), 100, 0.0) for wins, losses, _ in counts]
    # The score bound it may not exceed is an approximation, at its worst where one model only wins.
    assert np.mean([each.lower_bound <= joint[0] - joint[1] + 1e-12 for each in rounds]) >= 0.95 - 0.02 - slack(0.05)


def soft(random: np.random.Generator, n: int, loss: float) -> tuple[Scores, Scores]:
    """Return scores where every problem is uncertain, so that nearly all differ."""
    ability = random.uniform(loss, 1, size=n)
    return random.binomial(REPEATS, ability - loss, n) / REPEATS, random.binomial(REPEATS, ability, n) / REPEATS


def mostly_sure(random: np.random.Generator, n: int, loss: float) -> tuple[Scores, Scores]:
    """Return scores where few problems are uncertain and what is lost is lost in every repeat."""
    unsure, lost = random.random(n) < 0.02, random.random(n) < loss
    draw = [np.where(unsure, random.binomial(REPEATS, 0.5, n) / REPEATS, 1.0) for _ in range(2)]
    return np.where(lost, 0.0, draw[0]), np.where(lost, 1.0, draw[1])


@pytest.mark.parametrize(
    ("draw", "n", "margin"),
    [(soft, 60, 0.05), (soft, 200, 0.0), (mostly_sure, 100, 0.03), (mostly_sure, 300, 0.02), (mostly_sure, 100, 0.0)],
)
def test_scores_averaged_over_repeats_keep_the_promise(
    draw: Callable[[np.random.Generator, int, float], tuple[Scores, Scores]], n: int, margin: float
) -> None:
    random = np.random.default_rng(3)
    pairs = [draw(random, n, margin) for _ in range(600)]
    rounds = [paired_bounds(ours.tolist(), theirs.tolist(), margin=margin, confidence=0.95) for ours, theirs in pairs]
    assert np.mean([each.lower_bound > -margin + 1e-12 for each in rounds]) <= 0.05 + slack(0.05, 600)
    assert np.mean([each.interval[0] <= -margin <= each.interval[1] for each in rounds]) >= 0.95 - slack(0.05, 600)


@pytest.mark.parametrize("confidence", [0.95, 1 - 0.05 / 3])
@pytest.mark.parametrize(
    # A plain t bound passes .11, .13, .10 and .10 of these at .05, and .08, .08, .05 and .10 at .0167.
    ("n", "gain", "gains"),
    [(100, 1 / 8, 0.3), (250, 1 / 8, 0.1), (500, 1 / 8, 0.1), (500, 1 / 64, 0.3)],
)
def test_many_small_gains_do_not_hide_rare_collapses(n: int, gain: float, gains: float, confidence: float) -> None:
    """A problem collapses so rarely that gains and collapses balance: nothing is better. 1,000 rounds, error .007."""
    counts = np.random.default_rng(13).multinomial(n, (gains, gains * gain, 1 - gains * (1 + gain)), size=1000)

    @functools.cache
    def passes(up: int, down: int) -> bool:
        ours = [1 / 4 + gain] * up + [0.0] * down + [1 / 4] * (n - up - down)
        theirs = [1 / 4] * up + [1.0] * down + [1 / 4] * (n - up - down)
        return paired_bounds(ours, theirs, margin=0.0, confidence=confidence).lower_bound > 0

    level = 1 - confidence
    assert np.mean([passes(int(up), int(down)) for up, down, _ in counts]) <= level + slack(level, 1000)


def test_the_correction_for_skewness_costs_no_power_where_nothing_is_skewed() -> None:
    random, passed = np.random.default_rng(17), []
    for _ in range(300):
        ability = random.uniform(0, 1, size=200)
        ours, theirs = (random.binomial(8, np.clip(ability + better, 0, 1)) / 8 for better in (0.03, 0.0))
        t = stats.ttest_rel(ours, theirs, alternative="greater").pvalue < 0.05
        passed.append((paired_bounds(ours.tolist(), theirs.tolist(), margin=0.0, confidence=0.95).lower_bound > 0, t))
    assert np.mean([hall for hall, _ in passed]) >= np.mean([t for _, t in passed]) - 0.02


@pytest.mark.parametrize("n", [30, 100, 1000])
def test_equal_scores_keep_the_promise(n: int) -> None:
    # The candidate loses a share of all problems and by luck none of those drawn: the share that has this luck with
    # probability 0.05 is ruled out no more.
    bound = bounds(0, 0, n, 0.01)
    assert (1 + bound.lower_bound) ** n == pytest.approx(0.05)
    assert bound.interval == pytest.approx((-(1 - 0.025 ** (1 / n)), 1 - 0.025 ** (1 / n)))


def test_a_candidate_that_is_as_good_passes_when_the_benchmark_is_large_enough() -> None:
    def share_passed(n: int) -> float:
        counts = np.random.default_rng(7).multinomial(n, (0.05, 0.05, 0.90), size=300)
        return float(np.mean([bounds(int(w), int(x), n, 0.03).lower_bound > -0.03 for w, x, _ in counts]))

    assert share_passed(1000) > 0.9
    assert share_passed(100) < 0.4


def test_none_of_several_candidates_passes_by_luck_more_often_than_one_may() -> None:
    n, margin, looks = 300, 0.02, 3
    counts = np.random.default_rng(5).multinomial(n, (0.05, 0.07, 0.88), size=(ROUNDS, looks))

    def any_passes(confidence: float) -> float:
        passes = [
            [bounds(int(wins), int(losses), n, margin, confidence).lower_bound > -margin for wins, losses, _ in each]
            for each in counts
        ]
        return float(np.mean([any(each) for each in passes]))

    assert any_passes(0.95) > 0.1
    assert any_passes(1 - 0.05 / looks) <= 0.05 + slack(0.05)


@pytest.mark.parametrize(
    ("wins", "losses", "n", "margin"), [(5, 6, 200, 0.02), (9, 4, 200, 0.0), (40, 44, 1000, 0.01), (0, 0, 40, 0.05)]
)
def test_the_problems_said_to_settle_it_do_if_differences_go_on_as_they_were(
    wins: int, losses: int, n: int, margin: float
) -> None:
    bound = bounds(wins, losses, n, margin)
    assert bound.lower_bound <= -margin
    assert bound.needed is not None

    def passes(larger: int) -> bool:
        scaled = (round(count * larger / n) for count in (wins, losses))
        return bounds(*scaled, larger, margin).lower_bound > -margin

    # If not a problem too many were drawn against it, half of them would do; of equal scores there is no such draw.
    assert passes(math.ceil(bound.needed / 2) if wins + losses else bound.needed)


@pytest.mark.parametrize(
    ("wins", "losses", "n", "margin", "confidence"),
    [(40, 44, 1000, 0.01, 0.95), (40, 30, 500, 0.0, 0.95), (40, 30, 500, 0.0, 1 - 0.05 / 3)],
)
def test_the_problems_said_to_settle_it_do_four_times_in_five(
    wins: int, losses: int, n: int, margin: float, confidence: float
) -> None:
    needed = bounds(wins, losses, n, margin, confidence).needed
    assert needed is not None
    shares = (wins / n, losses / n, 1 - (wins + losses) / n)
    counts = np.random.default_rng(19).multinomial(needed, shares, size=400)
    passed = [bounds(int(up), int(down), needed, margin, confidence).lower_bound > -margin for up, down, _ in counts]
    # 400 rounds: a standard error of .02.
    assert np.mean(passed) == pytest.approx(0.8, abs=0.06)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_the_interval_of_an_accuracy_covers_it(share: float) -> None:
    # Exactly, over all numbers of right answers; Wilson's coverage oscillates about its level.
    n = 200
    ends = [mean_interval([1.0] * right + [0.0] * (n - right)) for right in range(n + 1)]
    truths = np.linspace(share - 0.01, share + 0.01, 21)
    inside = [
        [low <= truth <= high for low, high in ends] @ stats.binom.pmf(np.arange(n + 1), n, truth) for truth in truths
    ]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.012)


def test_the_interval_of_repeated_samples_covers_their_mean() -> None:
    random = np.random.default_rng(2)
    # Hard problems: most abilities near 0, a mean far from the middle.
    draws = [random.binomial(REPEATS, random.beta(0.5, 1.5, size=60)) / REPEATS for _ in range(250)]
    ends = [mean_interval(draw.tolist()) for draw in draws]
    assert np.mean([low <= 0.25 <= high for low, high in ends]) >= 0.95 - slack(0.05, 250)
    assert ends[0] == mean_interval(draws[0].tolist())
    width = float(np.mean([high - low for low, high in ends]))
    assert width == pytest.approx(2 * 1.96 * np.mean([draw.std() for draw in draws]) / math.sqrt(60), rel=0.1)


def test_equal_scores_leave_room_for_what_was_not_seen() -> None:
    low, high = mean_interval([0.5] * 20)
    assert low + high == pytest.approx(1)
    assert high - low == pytest.approx(1 - 0.025 ** (1 / 20))
    assert all(map(math.isnan, mean_interval([7.5] * 20)))


@pytest.mark.parametrize("score", [0.0, 0.5, 1.0])
def test_an_interval_is_not_narrower_where_one_score_differs(score: float) -> None:
    low, high = mean_interval([score] * 30)
    for other in {0.0, 1 / 8, 7 / 8, 1.0} - {score}:
        one_low, one_high = mean_interval([score] * 29 + [other])
        assert one_high - one_low >= high - low - 1e-12
        assert one_low <= math.fsum([score] * 29 + [other]) / 30 <= one_high
    assert mean_interval([0.0] * 29 + [1 / 8])[1] > mean_interval([0.0] * 30)[1] > 0.11


def test_no_interval_narrows_when_variance_appears() -> None:
    random = np.random.default_rng(41)
    for n in (2, 3, 5, 12, 40, 100, 300):
        widest = max(high - low for low, high in (mean_interval([score] * n) for score in (0.0, 0.3, 0.5, 1.0)))
        draws = [
            [0.0] + [1.0] * (n - 1),
            [0.999] + [1.0] * (n - 1),
            [0.5 - 1e-6] + [0.5] * (n - 1),
            random.integers(2, size=n).tolist(),
            *(random.binomial(8, random.beta(0.3, 0.3, size=n)) / 8 for _ in range(3)),
            *((random.random(n) < 0.02) * random.random(n) for _ in range(2)),
            random.beta(50, 2, size=n),
        ]
        for draw in draws:
            low, high = mean_interval([float(score) for score in draw])
            if np.ptp(draw) > 1e-9:
                assert high - low >= widest - 1e-12, (n, draw)
            assert low <= np.mean(draw) <= high


def test_an_interval_is_named_by_what_it_is() -> None:
    assert interval_name([0.0, 1.0, 1.0]) == interval_name([1.0, 1.0]) == "Wilson"
    assert interval_name([0.5, 1.0]) == "bootstrap over problems"
    assert interval_name([0.5, 0.5]) == "equal scores, room for what was not drawn"


def test_the_interval_of_rare_success_covers_it() -> None:
    """One problem in 25 is ever solved, and then always: bootstrap of what was drawn misses it. 500 rounds, 30 each."""
    random = np.random.default_rng(23)
    draws = [np.where(random.random(30) < 0.04, 1.0, random.binomial(8, 0.02, 30) / 8) for _ in range(500)]
    truth = 0.04 + 0.96 * 0.02
    inside = [low <= truth <= high for low, high in (mean_interval(draw.tolist()) for draw in draws)]
    assert np.mean(inside) >= 0.95 - slack(0.05, 500)


@pytest.mark.parametrize("confidence", [0.95, 0.995])
@pytest.mark.parametrize("accuracy", [0.95, 0.98, 0.998])
def test_the_lower_bound_of_an_accuracy_is_one_near_the_ceiling(accuracy: float, confidence: float) -> None:
    """Exactly, over all numbers of right answers."""
    n = 300
    bounds = np.array(
        [mean_lower_bound([1.0] * right + [0.0] * (n - right), confidence=confidence) for right in range(n + 1)]
    )
    over = stats.binom.pmf(np.arange(n + 1), n, accuracy)[bounds > accuracy].sum()
    assert over <= 1 - confidence + 1e-12


def test_the_lower_bound_of_averaged_scores_sees_problems_that_always_fail() -> None:
    """Nearly all right in every repeat, one in forty never: 400 rounds of 60 problems, error .011 at .05."""
    random = np.random.default_rng(29)
    over = 0
    for _ in range(400):
        scores = np.where(random.random(60) < 0.025, 0.0, random.binomial(8, 0.98, 60) / 8)
        over += mean_lower_bound(scores.tolist(), confidence=0.95) > 0.975 * 0.98
    assert over / 400 <= 0.05 + slack(0.05, 400)
    assert mean_lower_bound([0.5] * 60, confidence=0.95) == pytest.approx(0.5 * 0.05 ** (1 / 60))
