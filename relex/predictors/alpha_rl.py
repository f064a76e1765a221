"""AlphaRL (arXiv 2510.00553): the leading left singular vector of each matrix's delta, regressed on the step.

Per attention or MLP matrix and checkpoint, x_t = ||delta_t||_F u_t with u_t the leading left singular vector. A partial
least squares regression of one component of y on x, inverted at the target, gives x*; the prediction is W_0 + x* v^T
with v the last checkpoint's leading right singular vector. All other tensors are copied from the latest checkpoint.
The paper's y is the accuracy over that of the finished run, which is not known while it runs: here y is the step, or
measured accuracies. Every checkpoint of every matrix is decomposed once, for all targets (see `triplets` for what that
takes). Shape suffixes: K = checkpoints, M = rows of the matrix.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relex.errors import TargetError
from relex.predictors.predictor import Window
from relex.rank_one import RankOne
from relex.triplets import Source, triplets

Array = NDArray[np.float64]

# A spread below this share of the values is none.
_CONSTANT = 1e-12
_PARTS = frozenset(
    {
        "attn", "self_attn", "linear_attn", "attention", "self_attention", "mlp", "feed_forward", "ffn",
        # Mixtral and kin; OPT; encoders' and decoders' other attention; T5.
        "block_sparse_moe", "fc1", "fc2", "cross_attn", "encoder_attn", "SelfAttention", "EncDecAttention",
        "DenseReluDense",
        # Experts beside the attention, and those that all tokens share.
        "experts", "shared_mlp",
    }
)  # fmt: skip
# A look-up table that stands in T5's attention.
_TABLES = frozenset({"relative_attention_bias"})


@dataclass(frozen=True)
class AlphaRL:
    """Regression on the step; or on measured `accuracies` by step, and read at the accuracy `goal`."""

    accuracies: Mapping[str, float] | None = None
    goal: float | None = None

    def __post_init__(self) -> None:
        if (self.accuracies is None) != (self.goal is None):
            raise TargetError("alpha-rl: accuracies=FILE and goal=ACCURACY are given together or not at all.")

    @property
    def unit(self) -> "AlphaRL":
        """The method itself: nothing of it is shared with others."""
        return self

    @property
    def scale(self) -> float:
        """One."""
        return 1.0

    @property
    def by_tensor(self) -> bool:
        """What is added is known when all Grams are."""
        return False

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return fp64 zeros: the matrix is added to the base."""
        return torch.zeros(window.gram_TKK.shape[:-1], dtype=torch.float64)

    def moves(self, name: str, dimensions: int) -> bool:
        """Attention and MLP matrices, told by their names, are predicted; the others are the latest checkpoint's."""
        parts = name.split(".")
        return dimensions == 2 and not _PARTS.isdisjoint(parts) and _TABLES.isdisjoint(parts)

    def aim(self, target_step: int) -> float:
        """Return what the regression is read at: the goal, whatever the target, or the target step."""
        return float(target_step) if self.goal is None else self.goal

    def vectors(self, source: Source, aims: Sequence[float]) -> list[dict[str, RankOne]]:
        """Return what is added to the base at each aim, by tensor.

        Raises TargetError for a step without accuracy and for accuracies that are all the same, MemoryBudgetError.
        """
        y_K = self._measured(source.trajectory.steps)
        matrices: list[dict[str, RankOne]] = [{} for _ in aims]
        for name, decomposed in triplets(source, [(row, None) for row in range(source.count)]):
            signs_K = neighbour_signs(decomposed.left_PM)
            x_KM = (signs_K * decomposed.norm_P)[:, None] * decomposed.left_PM
            right_N = (signs_K[-1] * decomposed.right_PN[-1]).astype(np.float32)
            for by_name, aim in zip(matrices, aims, strict=True):
                left_M = inverse_regression(x_KM, y_K, aim).astype(np.float32)
                by_name[name] = source.outer(name, left_M, right_N)
        return matrices

    def _measured(self, steps: Sequence[int]) -> Array:
        if self.accuracies is None:
            return np.array(steps, dtype=np.float64)
        missing = [step for step in steps if str(step) not in self.accuracies]
        if missing:
            raise TargetError(
                f"alpha-rl: the accuracies have no step {missing[0]}, and the window has steps {list(steps)}. Measure"
                " every one of them."
            )
        y_K = np.array([self.accuracies[str(step)] for step in steps])
        if np.ptp(y_K) == 0.0:
            raise TargetError(
                f"alpha-rl: the accuracy is {y_K[0]:g} at every step of the window, so nothing can be told from it."
                " Widen the window, or leave accuracies out to regress on the step."
            )
        return y_K


def with_accuracies(accuracies: str | None = None, goal: float | None = None) -> AlphaRL:
    """Return the method with the accuracies in a JSON file, {step: accuracy}; raises TargetError."""
    if accuracies is None:
        return AlphaRL(None, goal)
    try:
        content = json.loads(Path(accuracies).read_bytes())
        values = {str(int(step)): float(value) for step, value in content.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise TargetError(
            f'alpha-rl: {accuracies} is no JSON file of accuracies by step, such as {{"10": 0.41}} ({error}).'
        ) from error
    if not all(math.isfinite(value) for value in values.values()):
        raise TargetError(f"alpha-rl: {accuracies} holds an accuracy that is not finite. Measure that step again.")
    return AlphaRL(values, goal)


def neighbour_signs(left_KM: Array) -> Array:
    """Return (K,) the signs with which no two neighbouring vectors point away from each other."""
    signs_K = np.ones(len(left_KM))
    for k in range(1, len(left_KM)):
        signs_K[k] = signs_K[k - 1] * (-1.0 if left_KM[k] @ left_KM[k - 1] < 0 else 1.0)
    return signs_K


def inverse_regression(x_KM: Array, y_K: Array, target: float) -> Array:
    """Return (M,) the x at which a one-component partial least squares regression of y on x says `target`."""
    mean_M, spread_M = x_KM.mean(axis=0), x_KM.std(axis=0, ddof=1)
    # The mean of equal numbers may be off by their rounding, which must not pass for a direction.
    constant_M = spread_M <= _CONSTANT * np.abs(x_KM).max(axis=0)
    spread_M[constant_M] = 1.0
    scaled_KM = np.where(constant_M, 0.0, (x_KM - mean_M) / spread_M)
    centred_K = y_K - y_K.mean()
    weights_M = scaled_KM.T @ centred_K
    length = float(np.linalg.norm(weights_M))
    # A matrix that went to one place and stayed there is expected to be there.
    if length == 0.0:
        stayed_M: Array = mean_M
        return stayed_M
    score_K = scaled_KM @ (weights_M / length)
    loading_M = scaled_KM.T @ score_K / (score_K @ score_K)
    slope = float(score_K @ centred_K / (score_K @ score_K))
    predicted_M: Array = mean_M + spread_M * loading_M * ((target - y_K.mean()) / slope)
    return predicted_M
