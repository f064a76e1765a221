"""What the norm intervals cover on runs whose truth is known: where a line is right, and where it cannot be."""

import math

import pytest
import torch
from torch import Tensor

from relex.interval import bootstrap_interval, line_interval, norm_band

SEEN = 24
RUNS = 200


def _path(kind: str, generator: torch.Generator, count: int, size: int) -> Tensor:
    """Return (count, size) of a run with a checkpoint at every step; those after step 24 are what is foretold."""
    first, second, third = torch.linalg.qr(torch.randn(max(size, 3), 3, generator=generator, dtype=torch.float64)).Q.mT[
        :, :size
    ]
    times = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    noise = torch.randn(count, size, generator=generator, dtype=torch.float64)
    if kind == "walk":
        return noise.cumsum(0) / math.sqrt(size)
    way: Tensor = {
        "drift": times * first,
        "curved": times * first + 0.01 * times.square() * (first + second),
        "saturating": 30.0 * (1.0 - torch.exp(-times / 30.0)) * first,
        "turning": times.clamp(max=SEEN) * first + (times - SEEN).clamp(min=0.0) * third,
    }[kind]
    return way + 6.0 / math.sqrt(size) * noise


def coverage(kind: str, target: int, *, size: int, runs: int = RUNS) -> list[float]:
    """Return how often, of `runs`, the real norm at the target is in each band from 24 checkpoints and in the wider."""
    steps_K = torch.arange(1, SEEN + 1, dtype=torch.float64)
    covered = [0, 0, 0]
    for seed in range(runs):
        deltas = _path(kind, torch.Generator().manual_seed(seed), target, size)
        gram_TKK = (deltas[:SEEN] @ deltas[:SEEN].mT)[None]
        for place, interval in enumerate((line_interval, bootstrap_interval, norm_band)):
            band = interval(gram_TKK, steps_K, target)
            assert band is not None
            covered[place] += band[0] <= float(deltas[-1].norm()) <= band[1]
    return [count / runs for count in covered]


@pytest.mark.parametrize("target", [30, 48])
@pytest.mark.parametrize("size", [5, 40])
def test_on_a_straight_drift_with_noise_ninety_per_cent_cover_ninety(size: int, target: int) -> None:
    """Of 200 runs: a standard error of .02. The band of a manifest is the wider of the two."""
    *each, band = coverage("drift", target, size=size)
    for covered in each:
        assert 0.85 <= covered <= 0.95
    assert 0.85 <= band <= 0.97


@pytest.mark.parametrize("kind", ["curved", "saturating", "walk", "turning"])
def test_where_the_run_does_not_go_on_straight_the_intervals_miss_it(kind: str) -> None:
    """Nothing in the steps seen tells of it far ahead: that is why they hold "if it goes on along a line"."""
    assert max(coverage(kind, 48, size=40, runs=60)) < 0.5


def test_a_run_along_a_line_has_an_interval_without_width() -> None:
    steps_K = torch.tensor([10, 20, 25, 40, 75], dtype=torch.float64)
    gram_TKK = torch.stack([torch.outer(steps_K, steps_K)] * 4)
    for interval in (line_interval, bootstrap_interval):
        assert interval(gram_TKK, steps_K, 200) == pytest.approx((400.0, 400.0))


def test_what_is_across_the_line_adds_to_the_norm_what_the_line_has_not_of_it() -> None:
    """Residuals at right angles to the drift: 14 in all, 3 degrees of freedom, the line's own error 1.1 of it."""
    deltas = torch.tensor([[1, 2, 3, 4, 5], [2, -1, -2, -1, 2]], dtype=torch.float64).mT
    for interval in (line_interval, bootstrap_interval):
        between = interval((deltas @ deltas.mT)[None], deltas[:, 0], 6)
        assert between == pytest.approx([(36 + 14 / 3 * (1 - 1.1)) ** 0.5] * 2)


def test_two_checkpoints_leave_no_residual_for_an_interval() -> None:
    steps_K = torch.tensor([10, 20], dtype=torch.float64)
    for interval in (line_interval, bootstrap_interval, norm_band):
        assert interval(torch.outer(steps_K, steps_K)[None], steps_K, 30) is None


def test_the_interval_is_in_the_unit_of_the_weights() -> None:
    deltas = _path("drift", torch.Generator().manual_seed(0), SEEN, 5)
    steps_K = torch.arange(1, SEEN + 1, dtype=torch.float64)
    gram_TKK = (deltas @ deltas.mT)[None]
    for interval in (line_interval, bootstrap_interval):
        once, tenfold = interval(gram_TKK, steps_K, 40), interval(100.0 * gram_TKK, steps_K, 40)
        assert once is not None
        assert tenfold == pytest.approx((10.0 * once[0], 10.0 * once[1]))
