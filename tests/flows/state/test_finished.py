"""The record of finished runs: what is kept, and what it lets a rule do."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flows.settings import Settings
from flows.state.finished import RISK, Finished, keep_finished, read_finished, vote
from tests.helpers.stopped import recorded


def run(points: float, cost: float, *, rule: str = "growth", window: int = 40) -> Finished:
    return Finished("r", "k", window, 200, "sums", 500, 0.5, 0.5 + cost / 100, {rule: points})


def test_a_run_is_one_small_file_with_its_looks(settings: Settings) -> None:
    looks = [replace(run(1.0, 0.3, window=window), training_run=settings.training_run) for window in (60, 40)]
    keep_finished(settings, looks)
    keep_finished(settings, looks)
    assert read_finished(settings.state) == [tuple(reversed(looks))]
    (path,) = (settings.state / "record").iterdir()
    assert path.stat().st_size < 2000
    assert read_finished(settings.state / "nothing") == []


@pytest.mark.parametrize(
    ("count", "costs", "allowed"), [(8, (), None), (9, (), 3.0), (9, (5.0,), None), (19, (5.0,), 3.0)]
)
def test_a_rule_has_its_vote_from_nine_runs_on(
    settings: Settings, count: int, costs: tuple[float, ...], allowed: float | None
) -> None:
    recorded(settings, count, costs=costs)
    assert vote(read_finished(settings.state), "ceiling", price=2.0) == allowed
    assert vote(read_finished(settings.state), "forecast", price=2.0) is None


def test_no_more_is_allowed_than_cost_nothing_so_far() -> None:
    runs = [[run(points, 0.0)] for points in range(1, 10)] + [[run(10, 9.0)], [run(11, 9.0)]]
    assert vote(runs, "growth", price=2.0) == 9
    # Stopped at its first such look, however the later ones would have gone.
    early = [*runs[:9], [run(4, 9.0, window=20), run(2, 0.0, window=40)]]
    assert vote(early, "growth", price=2.0) == 3
    assert vote(early, "growth", price=20.0) == 9


def test_of_runs_of_one_kind_a_rule_with_a_vote_stops_at_most_one_in_ten_at_a_loss() -> None:
    """A useless rule and one that tells a little; 15 runs before, 4,000 rounds each, error .005 at .1."""
    random = np.random.default_rng(1)
    for informative in (0.0, 1.0):
        costly = 0
        for _ in range(4000):
            cost = random.exponential(1.5, size=16)
            points = np.round(informative * cost + random.exponential(2.0, size=16), 2)
            runs = [[run(float(one), float(other))] for one, other in zip(points[:-1], cost[:-1], strict=True)]
            allowed = vote(runs, "growth", price=2.0)
            costly += allowed is not None and points[-1] <= allowed and cost[-1] > 2.0
        assert costly / 4000 <= RISK + 0.015


def test_without_the_record_the_same_rule_would_stop_at_a_loss_more_often() -> None:
    random = np.random.default_rng(1)
    assert np.mean(random.exponential(1.5, size=4000) > 2.0) > 2 * RISK


def test_what_lies_beside_the_records_is_not_one(settings: Settings, tmp_path: Path) -> None:
    recorded(settings, 2)
    (settings.state / "record" / "notes.txt").write_text("mine")
    assert len(read_finished(settings.state)) == 2
