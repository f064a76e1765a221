"""What a Gram says about a trajectory and a prediction without reading a weight again.

Shape suffixes: T = tensors (any batch), K = checkpoints, R = rank.
"""

import torch
from torch import Tensor

# Two-sided coverage of the norm band, and the normal quantile that gives it.
BAND_COVERAGE = 0.90
_BAND_QUANTILE = 1.6448536269514722
# A unit vector whose squared spread is below this is constant: its entries are not known any better.
_CONSTANT = torch.finfo(torch.float64).eps


def energy(gram_TKK: Tensor, rank: int = 1) -> Tensor:
    """Return (T,) the share of the squared deltas the best rank-`rank` trajectory holds; 1 for a frozen tensor."""
    values_TK = torch.linalg.eigvalsh(gram_TKK).clamp(min=0.0)
    total_T = values_TK.sum(-1)
    return torch.where(total_T > 0, values_TK[..., -rank:].sum(-1) / total_T, 1.0).clamp(max=1.0)


def r_squared(gram_TKK: Tensor, steps_K: Tensor) -> Tensor:
    """Return (T,) R² of the line in the step through the leading singular coordinate; 1 where that is constant."""
    _, vectors_TKK = torch.linalg.eigh(gram_TKK)
    # R² does not change with the coordinate's scale: the eigenvector itself will do.
    coordinate_TK = vectors_TKK[..., -1]
    centred_TK = coordinate_TK - coordinate_TK.mean(-1, keepdim=True)
    steps_K = steps_K - steps_K.mean()
    explained_T = (centred_TK @ steps_K).square() / steps_K.square().sum()
    total_T = centred_TK.square().sum(-1)
    # A zero Gram has arbitrary eigenvectors, its coordinate is zero throughout.
    moved_T = gram_TKK.diagonal(dim1=-2, dim2=-1).any(-1)
    return torch.where(moved_T & (total_T > _CONSTANT), explained_T / total_T, 1.0).clamp(max=1.0)


def pooled(gram_TKK: Tensor, values_T: Tensor) -> float:
    """Return the mean of a value per tensor, weighed by the tensor's squared deltas; all alike if none ever moved."""
    weights_T = gram_TKK.diagonal(dim1=-2, dim2=-1).sum(-1)
    total = weights_T.sum()
    return float(weights_T @ values_T / total) if float(total) > 0 else float(values_T.mean())


def norm(gram_TKK: Tensor, coefficients_TK: Tensor) -> Tensor:
    """Return the norm of sum_k c_k delta_k over all T tensors together (a scalar)."""
    squared_T = torch.einsum("tk,tkl,tl->t", coefficients_TK, gram_TKK, coefficients_TK)
    return squared_T.clamp(min=0.0).sum().sqrt()


def norm_band(gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> tuple[float, float] | None:
    """Return the 90 % band of the delta's norm at the target if every parameter goes on along its least-squares line.

    Centred on the line's own norm, as wide as the line's standard error there. The residuals of all lines add up to
    tr((I - H) G), H the hat matrix of (1, step). None with 2 checkpoints, where the line leaves no residual.
    """
    count = len(steps_K)
    if count < 3:
        return None
    centred_K = steps_K - steps_K.mean()
    spread = centred_K.square().sum()
    hat_KK = 1.0 / count + torch.outer(centred_K, centred_K) / spread
    residual = torch.einsum("kl,tlk->", torch.eye(count, dtype=torch.float64) - hat_KK, gram_TKK).clamp(min=0.0)
    distance = target_step - steps_K.mean()
    line_K = 1.0 / count + distance * centred_K / spread
    error = _BAND_QUANTILE * float((residual / (count - 2) * (1.0 / count + distance.square() / spread)).sqrt())
    centre = float(norm(gram_TKK, line_K.expand(len(gram_TKK), -1)))
    return max(0.0, centre - error), centre + error
