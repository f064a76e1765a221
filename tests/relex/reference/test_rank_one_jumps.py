"""The usual ways of the backtest against what their leading direction says, to 1e-12 of the real delta."""

import numpy as np
import pytest
import torch

from relex.backtest.skill import ALWAYS, jumps
from relex.predictors import parse_method
from tests.relex.reference.rank_one_jumps import errors

STEPS = {
    "even": tuple(range(10, 310, 10)),
    "irregular": (5, 10, 15, 20, 25, 40, 50, 60, 65, 80, 120, 125, 190, 240, 410),
    "few": (3, 4, 9, 11, 30),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("pattern", STEPS)
def test_every_jump_of_the_usual_ways_is_what_the_leading_direction_says(pattern: str, seed: int) -> None:
    steps = STEPS[pattern]
    generator = torch.Generator().manual_seed(seed)
    times = torch.tensor(steps, dtype=torch.float64)[:, None]
    drift_T1D = torch.randn(6, 1, 40, generator=generator, dtype=torch.float64)
    walk_TKD = torch.randn(6, len(steps), 40, generator=generator, dtype=torch.float64).cumsum(1)
    # From a straight line to a random walk; one tensor never moved, and one came late.
    shares = torch.tensor([0.0, 0.1, 0.3, 1.0, 0.0, 1.0], dtype=torch.float64)[:, None, None]
    deltas_TKD = (1.0 - shares) * 0.1 * times * drift_T1D + shares * walk_TKD
    deltas_TKD[4] = 0.0
    deltas_TKD[5, : len(steps) // 2] = 0.0
    gram_TKK = deltas_TKD @ deltas_TKD.mT
    made = jumps(gram_TKK, steps)
    assert made
    assert {way.method for way, _ in made} == set(ALWAYS)
    for (way, _), jump in made.items():
        method = parse_method(way.method)
        damping = method.parameters["damping"] if method.name == "relex-pinned" else None
        for number, (origin, target) in enumerate(zip(jump.origins, jump.targets, strict=True)):
            rows = [row for row, step in enumerate(steps) if way.start * origin <= step <= origin]
            for tensor, gram_KK in enumerate(gram_TKK.numpy()):
                expected = errors(gram_KK, steps, rows, steps.index(target), damping)
                got = {name: float(getattr(jump, name)[number, tensor]) for name in expected}
                if not np.any(gram_KK[np.ix_(rows, rows)]):
                    # A tensor that did not move yet has any direction: none of them adds anything.
                    assert (got["predicted"], got["inner"]) == (0.0, 0.0)
                size = max(expected["real"], expected["predicted"])
                assert got == pytest.approx(expected, rel=0, abs=1e-12 * size), (way, origin, target, tensor)
