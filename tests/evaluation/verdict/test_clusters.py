"""Clusters: what a bound promises where problems of one cluster go together, counted over many draws."""

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from evaluation.errors import ComparisonError
from evaluation.verdict.bounds import PairedBounds, paired_bounds
from evaluation.verdict.gate import gate
from tests.evaluation.verdict.test_gate import report

Scores = npt.NDArray[np.float64]
Draw = Callable[[np.random.Generator, int, float], Scores]
ROUNDS = 200


def alike(random: np.random.Generator, size: int, loss: float) -> Scores:
    """Return the differences of a cluster whose problems are one: won with probability .1, lost with .1 and `loss`."""
    drawn = random.random()
    return np.full(size, 1.0 if drawn < 0.1 else -1.0 if drawn < 0.2 + loss else 0.0)


def shifted(random: np.random.Generator, size: int, loss: float) -> Scores:
    """Return the differences of a cluster that leans to one of both models."""
    lean, drawn = np.clip(random.normal(0, 0.05), -0.15, 0.15), random.random(size)
    return np.where(drawn < 0.3 + lean, 1.0, np.where(drawn < 0.6 + loss, -1.0, 0.0))


def seldom(random: np.random.Generator, size: int, loss: float) -> Scores:
    """Return the differences of a cluster that hardly ever differs, and then in half of its problems."""
    if random.random() >= 0.06:
        return np.zeros(size)
    sign = 1.0 if random.random() < 0.5 - loss / 0.06 else -1.0
    return np.where(random.random(size) < 0.5, sign, 0.0)


def drawn(random: np.random.Generator, draw: Draw, sizes: list[int], clusters: int, margin: float) -> PairedBounds:
    of = [int(random.choice(sizes)) for _ in range(clusters)]
    difference = np.concatenate([draw(random, size, margin) for size in of])
    names = [f"text {number}" for number, size in enumerate(of) for _ in range(size)]
    ours, theirs = difference.clip(min=0).tolist(), (-difference).clip(min=0).tolist()
    return paired_bounds(ours, theirs, margin=margin, confidence=0.95, clusters=names)


EVEN, UNEVEN = [8], [1, 2, 4, 8, 20, 40]


@pytest.mark.parametrize(
    # Without clusters .41, .27, .08 and .38 of the first four pass, by t over clusters alone .29, .25, .07 and .05.
    ("draw", "clusters", "sizes", "margin"),
    [
        (seldom, 57, UNEVEN, 0.02),
        (alike, 6, EVEN, 0.02),
        (shifted, 20, EVEN, 0.0),
        pytest.param(alike, 57, UNEVEN, 0.02, marks=pytest.mark.slow),
        pytest.param(seldom, 10, UNEVEN, 0.0, marks=pytest.mark.slow),
        pytest.param(shifted, 57, UNEVEN, 0.02, marks=pytest.mark.slow),
    ],
)
def test_what_is_worse_by_the_margin_passes_in_no_more_than_five_of_a_hundred_draws(
    draw: Draw, clusters: int, sizes: list[int], margin: float
) -> None:
    """Rounds err by .015: at most .096 of 200 may pass. In 400 rounds of 40 kinds of draws it was at most .058."""
    random = np.random.default_rng(3)
    rounds = [drawn(random, draw, sizes, clusters, margin) for _ in range(ROUNDS)]
    limit = 0.05 + 3 * math.sqrt(0.05 * 0.95 / ROUNDS)
    assert np.mean([each.lower_bound > -margin + 1e-12 for each in rounds]) <= limit
    # The interval covers what is true, and either bound alone is inside of it.
    assert np.mean([each.interval[0] <= -margin + 1e-12 <= each.interval[1] + 2e-12 for each in rounds]) >= 1 - limit
    assert all(each.interval[0] <= each.lower_bound <= each.upper_bound <= each.interval[1] for each in rounds)


def test_what_every_one_of_twenty_subjects_gains_is_shown() -> None:
    """Twenty subjects of a hundred questions, five points more in each: found in .9 of draws."""
    random, shown = np.random.default_rng(5), 0
    names = [f"subject {number // 100}" for number in range(2000)]
    for _ in range(100):
        at = random.random(2000)
        gain = np.repeat(random.normal(0.05, 0.02, 20), 100)
        ours, theirs = (at < 0.15 + gain / 2).astype(float), (at > 0.85 + gain / 2).astype(float)
        bounds = paired_bounds(ours.tolist(), theirs.tolist(), margin=0.0, confidence=0.95, clusters=names)
        shown += bounds.lower_bound > 0
    assert shown >= 75


def test_clusters_never_let_more_pass_than_independent_problems() -> None:
    random = np.random.default_rng(7)
    ours, theirs = (random.random(120) < 0.5).astype(float), (random.random(120) < 0.4).astype(float)
    # By chance the clusters are more alike than problems are.
    even = [f"{number % 12}" for number in range(120)]
    one = [f"{number}" for number in range(120)]
    alone = paired_bounds(ours.tolist(), theirs.tolist(), margin=0.0, confidence=0.95)
    for names in (even, one):
        together = paired_bounds(ours.tolist(), theirs.tolist(), margin=0.0, confidence=0.95, clusters=names)
        assert together.lower_bound <= alone.lower_bound + 1e-12
        assert together.upper_bound >= alone.upper_bound - 1e-12


def test_the_verdict_names_the_clusters_and_claims_nothing_of_the_candidate_alone() -> None:
    clusters = [f"text {number // 4}" for number in range(40)]
    decision = gate(report([1.0] * 40), report([0.0] * 40, "/models/reference"), margin=0.0, clusters=clusters)
    assert (decision.method, decision.clusters) == ("t over 10 clusters", 10)
    assert decision.candidate_at_least is None


def test_problems_of_one_cluster_alone_are_refused() -> None:
    with pytest.raises(ComparisonError, match="all 3 problems of plus are of the cluster text 1"):
        gate(report([1, 0, 1]), report([1, 1, 0]), margin=0.0, clusters=["text 1"] * 3)
