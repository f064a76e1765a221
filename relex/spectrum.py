"""What a Gram says about a trajectory and a prediction without reading a weight again.

Shape suffixes: T = tensors (any batch), K = checkpoints, R = rank.
"""

import torch
from torch import Tensor

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
