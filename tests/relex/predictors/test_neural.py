import pytest
import torch
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.low_rank import LowRankLinear
from relex.predictors.neural import Neural
from relex.predictors.predictor import Window

STEPS = torch.tensor([2.0, 4, 5, 8, 10, 12, 15, 16, 18, 20, 22, 24, 27, 28, 30, 32], dtype=torch.float64)


def deltas(curve: Tensor, *, noise: float, tensors: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return deltas (T, K, 40) of tensors that all move along `curve` (K,), and their directions (T, 40)."""
    generator = torch.Generator().manual_seed(seed)
    direction_TD = torch.randn(tensors, 40, generator=generator, dtype=torch.float64)
    noise_TKD = torch.randn(tensors, len(curve), 40, generator=generator, dtype=torch.float64)
    return curve[None, :, None] * direction_TD[:, None] + noise * noise_TKD, direction_TD


def predicted(predictor: Neural | LowRankLinear, deltas_TKD: Tensor, target: float) -> Tensor:
    grams = deltas_TKD @ deltas_TKD.mT
    if isinstance(predictor, Neural):
        coefficients_TK = predictor.coefficients(Window(grams, STEPS), target)
    else:
        coefficients_TK = torch.stack([predictor.coefficients(Window(gram, STEPS), target) for gram in grams])
    return torch.einsum("tk,tkd->td", coefficients_TK, deltas_TKD)


def test_untrained_it_is_the_line_through_the_first_and_the_last_point() -> None:
    deltas_TKD, _ = deltas(STEPS.sqrt(), noise=0.0)
    first, last = deltas_TKD[:, 0], deltas_TKD[:, -1]
    expected = last + (last - first) / (STEPS[-1] - STEPS[0]) * (50.0 - STEPS[-1])
    assert torch.allclose(predicted(Neural(epochs=0), deltas_TKD, 50.0), expected, rtol=1e-5)


def test_it_learns_from_all_tensors_how_a_run_slows_down() -> None:
    deltas_TKD, direction_TD = deltas(1 - torch.exp(-STEPS / 20), noise=0.002)
    truth = (1 - torch.exp(torch.tensor(-40.0 / 20))) * direction_TD
    error = float((predicted(Neural(epochs=60), deltas_TKD, 40.0) - truth).norm() / truth.norm())
    line = float((predicted(LowRankLinear(), deltas_TKD, 40.0) - truth).norm() / truth.norm())
    assert error < 0.5 * line, (error, line)


def test_the_same_seed_is_the_same_prediction_and_the_generator_of_others_is_left_alone() -> None:
    deltas_TKD, _ = deltas(STEPS.sqrt(), noise=0.1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, two = (predicted(Neural(epochs=5), deltas_TKD, 60.0) for _ in range(2))
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(predicted(Neural(epochs=5, seed=1), deltas_TKD, 60.0), one)


def test_a_tensor_that_never_moved_has_no_part_in_it() -> None:
    deltas_TKD, _ = deltas(STEPS.sqrt(), noise=0.1)
    deltas_TKD[3] = 0.0
    assert torch.equal(predicted(Neural(epochs=5), deltas_TKD, 60.0)[3], torch.zeros(40, dtype=torch.float64))


def test_too_few_checkpoints_are_refused_with_both_numbers() -> None:
    with pytest.raises(TargetError, match="needs at least 3 checkpoints, and the window has 2"):
        Neural().coefficients(Window(torch.eye(2, dtype=torch.float64)[None], STEPS[:2]), 60.0)
