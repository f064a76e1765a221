"""How far a prediction is from the checkpoint that the run really reached, told from one Gram of all of them.

With c the prediction's coefficients and e_m those of the real checkpoint, the squared distance of the two is
(c - e_m)ᵀ G (c - e_m): no weight is read. Shape suffixes: T = tensors that move, K = observed checkpoints, M = all of
the Gram's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from relex.forecast import Forecast
from relex.gram import Gram


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


def distance(gram: Gram, prediction: Forecast, step: int) -> Distance | None:
    """Compare a prediction with the checkpoint at `step`.

    `gram` is of the observed checkpoints, in their order, and of later ones after them. None when it has no such step,
    or when a tensor of the prediction is no combination of checkpoints.
    """
    if step not in gram.steps or not is_combination(prediction):
        return None
    predicted_TM = _coefficients(gram, prediction)
    real_TM, held_TM = torch.zeros_like(predicted_TM), torch.zeros_like(predicted_TM)
    real_TM[:, gram.steps.index(step)] = 1.0
    held_TM[:, len(prediction.steps) - 1] = 1.0
    real = _product(gram, real_TM, real_TM) ** 0.5
    norm = _product(gram, predicted_TM, predicted_TM) ** 0.5
    missed = _product(gram, predicted_TM - real_TM, predicted_TM - real_TM)
    waited = _product(gram, held_TM - real_TM, held_TM - real_TM)
    if real == 0.0:
        return None
    return Distance(
        error=missed**0.5 / real,
        cosine=_product(gram, predicted_TM, real_TM) / (norm * real) if norm > 0 else 0.0,
        norm_ratio=norm / real,
        skill=1.0 - missed / waited if step > prediction.steps[-1] and waited > 0 else None,
    )


def is_combination(prediction: Forecast) -> bool:
    """Whether every tensor is a combination of checkpoints, so that its coefficients say everything."""
    return all(item.source in ("base", "combined", "latest") for item in prediction.tensors.values())


def _coefficients(gram: Gram, prediction: Forecast) -> Tensor:
    count = len(prediction.steps)
    found_TM = torch.zeros(len(gram.names), len(gram.steps), dtype=torch.float64)
    for row_M, name in zip(found_TM, gram.names, strict=True):
        item = prediction.tensors[name]
        if item.source == "latest":
            row_M[count - 1] = 1.0
        if item.source == "combined":
            row_M[:count] = torch.tensor(item.coefficients, dtype=torch.float64)
    return found_TM


def _product(gram: Gram, left_TM: Tensor, right_TM: Tensor) -> float:
    # Rounding may leave the square of a tiny difference below zero.
    product = float(torch.einsum("tm,tmn,tn->", left_TM, gram.products, right_TM))
    return max(0.0, product) if left_TM is right_TM else product
