"""What the Gram says is what the dense matrix of deltas says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from relex import spectrum
from tests.helpers.trajectories import STEPS
from tests.relex.reference import dense

STEPS_K = torch.tensor(STEPS, dtype=torch.float64)
BLOCKS = arrays("float64", (2, 5, 6), elements=st.floats(-4, 4, width=16))


def _deltas(seed: int = 0) -> Tensor:
    """Return (3, 5, 30): three tensors whose first one dominates and drifts along the step."""
    deltas_TKD = torch.randn(3, 5, 30, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    deltas_TKD[0] += STEPS_K[:, None]
    return deltas_TKD


@pytest.mark.parametrize("rank", [1, 2, 3, 5])
def test_energy_and_r_squared_agree_with_the_svd(rank: int) -> None:
    deltas_TKD = _deltas()
    gram_TKK = deltas_TKD @ deltas_TKD.mT
    expected = [dense.energy(block.numpy(), rank) for block in deltas_TKD]
    assert spectrum.energy(gram_TKK, rank).tolist() == pytest.approx(expected, rel=1e-12)
    expected = [dense.r_squared(block.numpy(), STEPS) for block in deltas_TKD]
    assert spectrum.r_squared(gram_TKK, STEPS_K).tolist() == pytest.approx(expected, rel=1e-10)


def test_the_norm_is_that_of_the_combined_deltas() -> None:
    deltas_TKD = _deltas()
    coefficients_TK = torch.randn(3, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    combined = torch.einsum("tk,tkd->td", coefficients_TK, deltas_TKD)
    result = float(spectrum.norm(deltas_TKD @ deltas_TKD.mT, coefficients_TK))
    assert result == pytest.approx(float(combined.norm()), rel=1e-12)


@given(BLOCKS, st.integers(1, 5))
@settings(deadline=None, max_examples=80)
def test_energy_and_r_squared_are_shares(block: dense.Array, rank: int) -> None:
    deltas_TKD = torch.from_numpy(block)
    gram_TKK = deltas_TKD @ deltas_TKD.mT
    for share in (spectrum.energy(gram_TKK, rank), spectrum.r_squared(gram_TKK, STEPS_K)):
        assert bool(((share >= 0) & (share <= 1)).all()), share


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=80)
def test_two_checkpoints_lie_on_a_line_and_on_no_more_than_it(seed: int) -> None:
    deltas_TKD = _deltas(seed)[:, :2]
    result = spectrum.r_squared(deltas_TKD @ deltas_TKD.mT, STEPS_K[:2])
    assert result.tolist() == pytest.approx([1.0] * 3)
    assert float(result.max()) <= 1.0


def test_a_tensor_that_never_moved_is_explained_in_full() -> None:
    assert spectrum.energy(torch.zeros(1, 5, 5, dtype=torch.float64)).item() == 1.0


@pytest.mark.parametrize("size", [1.0, 1e-9, 3e4])
def test_a_coordinate_that_stands_still_is_a_line(size: float) -> None:
    """All checkpoints alike: what eigh leaves of the coordinate's spread is its own rounding, and no signal."""
    gram_TKK = torch.full((1, 5, 5), size, dtype=torch.float64)
    assert spectrum.r_squared(gram_TKK, STEPS_K).item() == 1.0
