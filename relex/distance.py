"""How far a prediction is from the checkpoint that the run really reached, told from one Gram of all of them.

With c the prediction's coefficients and e_m those of the real checkpoint, the squared distance of the two is
(c - e_m)ᵀ G (c - e_m): no weight is read. Of what a matrix method adds, the part along the real checkpoint is asked for
besides (see `along`). Shape suffixes: T = tensors that move, K = observed checkpoints, M = all of
the Gram's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relex.forecast import Forecast
from relex.gram import Gram
from relex.trajectory import Trajectory
from relex.triplets import Source, anchored


@dataclass(frozen=True)
class Distance:
    """A prediction against the real checkpoint of its step, all tensors together, before the rounding of the output.

    `error` is the norm of the difference and `norm_ratio` that of the predicted delta, both over the norm of the real
    delta; `cosine` is between the two deltas. `skill` is 1 - error² / error² of holding the last observed checkpoint:
    above 0 is better than waiting; None where the real checkpoint was observed.
    """

    error: float
    cosine: float
    norm_ratio: float
    skill: float | None


def along(trajectory: Trajectory, prediction: Forecast, step: int, *, memory: int, threads: int) -> float:
    """Return the inner product of what a matrix method adds with the real delta at `step`, which is read for it."""
    if not prediction.vectors:
        return 0.0
    source = Source(trajectory, tuple(prediction.vectors), memory, threads)
    row = trajectory.steps.index(step)
    return sum(matrix.inner for matrix in anchored(source, prediction.vectors, row).values())


def distance(gram: Gram, prediction: Forecast, step: int, *, added: float = 0.0) -> Distance | None:
    """Compare a prediction with the checkpoint at `step`; None when the Gram has no such step.

    `gram` is of the observed checkpoints, in their order, and of later ones after them. `added` is what `along` returns
    for a prediction by a matrix method.
    """
    if step not in gram.steps:
        return None
    predicted_TM = _coefficients(gram, prediction)
    real_TM, held_TM = torch.zeros_like(predicted_TM), torch.zeros_like(predicted_TM)
    real_TM[:, gram.steps.index(step)] = 1.0
    held_TM[:, len(prediction.steps) - 1] = 1.0
    real = _product(gram, real_TM, real_TM) ** 0.5
    # Beyond the combination: the squares of what is added, and twice its product with what it is added to.
    beyond = sum(matrix.square + 2.0 * matrix.inner for matrix in prediction.vectors.values())
    norm = max(0.0, _product(gram, predicted_TM, predicted_TM) + beyond) ** 0.5
    missed = max(0.0, _product(gram, predicted_TM - real_TM, predicted_TM - real_TM) + beyond - 2.0 * added)
    waited = _product(gram, held_TM - real_TM, held_TM - real_TM)
    if real == 0.0:
        return None
    return Distance(
        error=missed**0.5 / real,
        cosine=(_product(gram, predicted_TM, real_TM) + added) / (norm * real) if norm > 0 else 0.0,
        norm_ratio=norm / real,
        skill=1.0 - missed / waited if step > prediction.steps[-1] and waited > 0 else None,
    )


def is_combination(prediction: Forecast) -> bool:
    """Whether every tensor is a combination of checkpoints, so that its coefficients say everything."""
    return all(tensor.source in ("base", "combined", "latest") for tensor in prediction.tensors.values())


def _coefficients(gram: Gram, prediction: Forecast) -> Tensor:
    count = len(prediction.steps)
    found_TM = torch.zeros(len(gram.names), len(gram.steps), dtype=torch.float64)
    for row_M, name in zip(found_TM, gram.names, strict=True):
        tensor = prediction.tensors[name]
        if tensor.source == "latest":
            row_M[count - 1] = 1.0
        if tensor.source in ("combined", "rank-one"):
            row_M[:count] = torch.tensor(tensor.coefficients, dtype=torch.float64)
    return found_TM


def _product(gram: Gram, left_TM: Tensor, right_TM: Tensor) -> float:
    # Rounding may leave the square of a tiny difference below zero.
    product = float(torch.einsum("tm,tmn,tn->", left_TM, gram.products, right_TM))
    return max(0.0, product) if left_TM is right_TM else product
