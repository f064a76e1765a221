"""NExt (arXiv 2604.11446): what the leading direction of every matrix becomes, learnt from the window.

Per tensor and checkpoint i: the global delta W_i - W_0, the local one W_i - W_(i-1) and the target W_(i+k) - W_i, k
checkpoints ahead, of each the leading singular triplet (u, sigma, v). One network for each length of vector, shared by
all tensors with such a vector, learns the target's from the other two; u, sigma and v have networks of their own, and
so have 1-D tensors, which are their own vector. The prediction is W_last + alpha sigma u v^T, with u and v normalised.

Its horizon is k checkpoints times alpha, whatever the target step, which only names the output; checkpoints should be
evenly spaced. Tensors with a side longer than LONGEST (embeddings) are the latest checkpoint's, and so are those of
three dimensions, such as convolutions; experts that are stored fused come one by one.

Three decompositions a checkpoint and matrix (see `triplets`), and training that grows with rows plus columns of all
tensors times checkpoints: 1000 epochs on one core took 75 s for 0.4 M parameters and 24 checkpoints, which makes most
of a day for 1.5 B parameters and 75.
Shape suffixes: K = checkpoints, D = length of a vector, S = series (one a tensor), P = differences.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relex.errors import TargetError
from relex.predictors import next_network
from relex.predictors.predictor import Window
from relex.progress import Progress
from relex.rank_one import RankOne
from relex.triplets import Pair, Source, Triplets, anchored, triplets

LONGEST = 1 << 15

Array = NDArray[np.float32]

Part = Literal["left", "sigma", "right", "vector"]


@dataclass(frozen=True)
class _Series:
    """One part of one tensor: globals and locals (K, D) of every checkpoint, targets (K - k, D) of the first ones."""

    tensor: str
    globals_KD: Array
    locals_KD: Array
    targets_PD: Array


@dataclass(frozen=True)
class Next:
    """`alpha` times what `ahead` checkpoints bring; `epochs` and `seed` are of the training."""

    alpha: float = 1.5
    ahead: int = 5
    epochs: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.ahead < 1 or self.epochs < 0:
            raise TargetError(f"ahead is {self.ahead} and epochs {self.epochs}; give at least 1 and 0.")

    @property
    def unit(self) -> "Next":
        """The method with alpha 1, whose training all alphas share."""
        return replace(self, alpha=1.0)

    @property
    def scale(self) -> float:
        """What multiplies the unit's vectors."""
        return self.alpha

    @property
    def by_tensor(self) -> bool:
        """What is added is known when all Grams are."""
        return False

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return fp64 coefficients of the latest checkpoint, which the matrix is added to."""
        coefficients_K = torch.zeros(len(window.steps_K), dtype=torch.float64)
        coefficients_K[-1] = 1.0
        return coefficients_K.expand(window.gram_TKK.shape[:-1])

    def moves(self, name: str, dimensions: int) -> bool:
        """Matrices and vectors are predicted, as long as they are not too long."""
        return dimensions in (1, 2)

    def aim(self, target_step: int) -> float:
        """Return how many checkpoints ahead it looks, whatever the target."""
        return float(self.ahead)

    def vectors(self, source: Source, aims: Sequence[float]) -> list[dict[str, RankOne]]:
        """Return what is added to the latest checkpoint, by tensor: the same at every aim.

        Raises TargetError when no checkpoint of the window lies `ahead` of another, MemoryBudgetError.
        """
        if self.ahead >= source.count:
            raise TargetError(
                f"next learns from pairs of checkpoints ahead={self.ahead} apart, and the window has {source.count}"
                f" checkpoints. Widen it, or give ahead={source.count - 1} or less."
            )
        shapes = {name: shape for name, shape in source.shapes().items() if max(shape) <= LONGEST}
        if not shapes:
            return [{} for _ in aims]
        collected = self._collect(source, shapes)
        # What an epoch of one network takes, roughly.
        cost = {key: len(series) * key[1] for key, series in collected.items()}
        begun, total = 0, self.epochs * sum(cost.values())
        predicted: dict[tuple[str, Part], Array] = {}
        for key, series in collected.items():
            made_SD = self._predict(series, _telling(source.on_progress, begun, cost[key], total))
            predicted |= {(one.tensor, key[0]): vector_D for one, vector_D in zip(series, made_SD, strict=True)}
            begun += self.epochs * cost[key]
        added = {name: _outer(predicted, name, source) for name in shapes}
        return [anchored(source, added, source.count - 1)] * len(aims)

    def _collect(self, source: Source, shapes: dict[str, tuple[int, int]]) -> dict[tuple[Part, int], list[_Series]]:
        """Return the series of every part and length."""
        count = source.count
        pairs: list[Pair] = [(row, None) for row in range(count)]
        pairs += [(0, None), *((later, earlier) for earlier, later in pairwise(range(count)))]
        pairs += [(row + self.ahead, row) for row in range(count - self.ahead)]
        longest = max(max(shape) for shape in shapes.values())
        kept = 4 * len(pairs) * sum(sum(shape) + 1 for shape in shapes.values())
        # Once as they are collected and, of one network at a time, once more as its samples.
        held = 2 * kept + next_network.memory(longest)
        collected: dict[tuple[Part, int], list[_Series]] = {}
        for name, decomposed in triplets(source, pairs, names=list(shapes), held=held):
            for part, values_PD in _parts(decomposed, reference=count - 1):
                series = _Series(name, values_PD[:count], values_PD[count : 2 * count], values_PD[2 * count :])
                collected.setdefault((part, values_PD.shape[1]), []).append(series)
        # By name, so that the bits do not depend on how the model is stored.
        return {key: sorted(series, key=lambda one: one.tensor) for key, series in collected.items()}

    def _predict(self, series: Sequence[_Series], on_epoch: Callable[[int], None]) -> Array:
        """Train on all pairs of the window and return (S, D) what is predicted from its last checkpoint."""
        count = len(series[0].targets_PD)
        return next_network.learn(
            _rows([one.globals_KD[:count] for one in series]),
            _rows([one.locals_KD[:count] for one in series]),
            _rows([one.targets_PD for one in series]),
            _rows([one.globals_KD[-1:] for one in series]),
            _rows([one.locals_KD[-1:] for one in series]),
            epochs=self.epochs,
            seed=self.seed,
            on_epoch=on_epoch,
        ).numpy()


def _rows(parts: Sequence[Array]) -> Tensor:
    return torch.from_numpy(np.concatenate(parts))


def _parts(decomposed: Triplets, *, reference: int) -> Iterator[tuple[Part, Array]]:
    """Yield the parts (P, D) that are learnt, with signs that agree with those of one difference."""
    if decomposed.right_PN.shape[1] == 1:
        yield "vector", (decomposed.left_PM * decomposed.sigma_P[:, None] * decomposed.right_PN).astype(np.float32)
        return
    signs_P = reference_signs(decomposed, reference)[:, None]
    yield "left", (signs_P * decomposed.left_PM).astype(np.float32)
    yield "sigma", decomposed.sigma_P[:, None].astype(np.float32)
    yield "right", (signs_P * decomposed.right_PN).astype(np.float32)


def reference_signs(decomposed: Triplets, reference: int) -> NDArray[np.float64]:
    """Return (P,) the signs with which every u and v point the way of those of one difference.

    Of that one the largest entry of u is made positive, since its own sign is the library's choice.
    """
    left_M = decomposed.left_PM[reference]
    own = -1.0 if left_M[np.abs(left_M).argmax()] < 0 else 1.0
    agreement_P = own * (decomposed.left_PM @ left_M + decomposed.right_PN @ decomposed.right_PN[reference])
    return np.where(agreement_P < 0, -1.0, 1.0)


def _outer(predicted: dict[tuple[str, Part], Array], name: str, source: Source) -> RankOne:
    vector_D = predicted.get((name, "vector"))
    if vector_D is not None:
        return RankOne(vector_D, np.ones(1, dtype=np.float32))
    left_M, right_N = (_normalised(predicted[name, part]) for part in ("left", "right"))
    return source.outer(name, left_M * predicted[name, "sigma"], right_N)


def _normalised(vector_D: Array) -> Array:
    length = np.linalg.norm(vector_D)
    return vector_D / length if length > 0 else vector_D


def _telling(progress: Progress | None, begun: int, cost: int, total: int) -> Callable[[int], None]:
    """Return what is called with the epochs of one network that are done, `begun` being done before it."""
    return lambda epochs: progress(begun + epochs * cost, total) if progress is not None else None
