"""What a method has to answer: the coefficients of one window, and which tensors it moves.

Shape suffixes: T = tensors, K = checkpoints of the window.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from relex.rank_one import RankOne
from relex.triplets import Source


@dataclass(frozen=True, eq=False)
class Window:
    """The observed checkpoints as a method sees them: Grams (T, K, K) of their deltas and training steps (K,), fp64.

    The steps increase, with any spacing. A single Gram (K, K) is allowed.
    """

    gram_TKK: Tensor
    steps_K: Tensor

    @cached_property
    def eigen(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues (T, K), rising, and eigenvectors (T, K, K), a column each: computed once for all that ask."""
        values_TK, vectors_TKK = torch.linalg.eigh(self.gram_TKK)
        return values_TK, vectors_TKK


class Predictor(Protocol):
    """What a family of methods is."""

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients c: tensor t is predicted as theta_0 + sum_k c_tk delta_k.

        A single Gram gives (K,). Raises TargetError for a window that the family's parameters do not fit.
        """

    def moves(self, name: str, dimensions: int) -> bool:
        """Say whether this tensor is predicted (here every one); if not, it is copied from the latest checkpoint."""
        return True

    @property
    def by_tensor(self) -> bool:
        """Whether a tensor's coefficients, to the last bit, follow from its own Gram (see `forecast.of_tensor`)."""
        return True


@runtime_checkable
class MatrixPredictor(Predictor, Protocol):
    """A family that adds a rank-one matrix to what its coefficients say, tensor by tensor."""

    @property
    def unit(self) -> "MatrixPredictor":
        """The predictor whose vectors, times `scale`, are this one's: those with one unit are computed once."""

    @property
    def scale(self) -> float:
        """What the unit's vectors are multiplied by."""

    def aim(self, target_step: int) -> float:
        """Return what the vectors depend on of the target: targets with one aim have the same vectors."""

    def vectors(self, source: Source, aims: Sequence[float]) -> list[dict[str, RankOne]]:
        """Return what is added, at each aim, to the tensors of `source`, in one pass; a tensor may be left out."""
