"""Methods by name: each turns the Grams of tensors, the steps and a target into K coefficients a tensor and reads no
weights; matrix methods add a rank-one matrix to each, for which they do.

A family is one module; a method is a row of METHODS: a family with some parameters fixed and some left to the user.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from relex.errors import TargetError
from relex.predictors.alpha_rl import with_accuracies
from relex.predictors.coordinates import Coordinates
from relex.predictors.low_rank import LowRankLinear
from relex.predictors.mean import Mean
from relex.predictors.neural import Neural
from relex.predictors.next import Next
from relex.predictors.raw import RawLinear
from relex.predictors.reconstruct import Reconstruct
from relex.predictors.secant import Secant
from relex.rank_one import Outer
from relex.triplets import Source


class Predictor(Protocol):
    """What a family is."""

    def coefficients(self, gram_TKK: Tensor, steps_K: Tensor, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients c: tensor t is predicted as theta_0 + sum_k c_tk delta_k.

        The steps increase, with any spacing. A single Gram (K, K) gives (K,).
        """

    def moves(self, name: str, dimensions: int) -> bool:
        """Say whether this tensor is predicted; if not, it is copied from the latest checkpoint."""


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

    def vectors(self, source: Source, aims: Sequence[float]) -> list[dict[str, Outer]]:
        """Return what is added, at each aim, to the tensors of `source`, in one pass; a tensor may be left out."""


@dataclass(frozen=True)
class Row:
    """One line of METHODS: what it is, what builds it, which parameters may be given and how they are read."""

    summary: str
    build: Callable[..., Predictor]
    parameters: Mapping[str, Callable[[str], Any]]


def _first_update(alpha: float) -> Predictor:
    return Secant(end="first", beta=alpha)


def _expo(alpha: float = 2.0) -> Predictor:
    return Secant(beta=1.0 + alpha)


METHODS: Mapping[str, Row] = {
    "relex": Row("rank-r line rebuilt from the base (RELEX)", LowRankLinear, {"rank": int}),
    "relex-pinned": Row(
        "rank-r slope added to the latest checkpoint, damped",
        partial(LowRankLinear, anchor="latest"),
        {"rank": int, "damping": float},
    ),
    "polynomial": Row(
        "polynomial of any degree through the rank-r coordinates",
        Coordinates,
        {"rank": int, "degree": int, "last": int, "refit": int},
    ),
    "sinusoid": Row(
        "sinusoid through the rank-r coordinates",
        partial(Coordinates, curve="sinusoid"),
        {"rank": int, "last": int, "refit": int},
    ),
    "neural": Row(
        "Transformer on the rank-r coordinates of all tensors", Neural, {"rank": int, "epochs": int, "seed": int}
    ),
    "raw": Row("least-squares line through every parameter", RawLinear, {}),
    "weight-extrapolation": Row(
        "line through two checkpoints, norms copied", partial(Secant, norms="copy"), {"start": int}
    ),
    "expo": Row("latest delta times 1 + alpha, whatever the target", _expo, {"alpha": float}),
    "first-update": Row("first delta times alpha, whatever the target", _first_update, {"alpha": float}),
    "mean": Row("average of the last checkpoints", Mean, {"last": int}),
    "reconstruct": Row("an observed checkpoint within the rank-r directions, no fit", Reconstruct, {"rank": int}),
    "alpha-rl": Row(
        "leading left vector of each matrix regressed on the step (AlphaRL)",
        with_accuracies,
        {"accuracies": str, "goal": float},
    ),
    "next": Row(
        "networks learn the next leading direction of each matrix (NExt), whatever the target",
        Next,
        {"alpha": float, "ahead": int, "epochs": int, "seed": int},
    ),
    "hold": Row("the latest checkpoint itself: the baseline to beat", Mean, {}),
}


@dataclass(frozen=True)
class Method:
    """A predictor and the name and parameters it was asked for by."""

    name: str
    parameters: Mapping[str, Any]
    predictor: Predictor

    @property
    def spec(self) -> str:
        """The canonical `name:parameter=value,…`; parse_method(spec) gives the same method."""
        given = ",".join(f"{key}={value}" for key, value in sorted(self.parameters.items()))
        return f"{self.name}:{given}" if given else self.name

    @property
    def directory(self) -> str:
        """The spec as it is written in a path: what a directory of its predictions is called."""
        return self.spec.replace(":", "-").replace(",", "-").replace("=", "")

    def describe(self) -> dict[str, Any]:
        """Return name, given parameters and every parameter of the family, for a manifest."""
        family = asdict(self.predictor)  # type: ignore[call-overload]
        return {
            "name": self.name,
            "parameters": dict(self.parameters),
            "family": {type(self.predictor).__name__: family},
        }


def parse_method(spec: str) -> Method:
    """Parse `name` or `name:parameter=value,…`; raises TargetError listing what is known."""
    name, _, tail = spec.partition(":")
    row = METHODS.get(name)
    if row is None:
        raise TargetError(f"method {name!r} is not known; known are {', '.join(METHODS)}.")
    parameters = {}
    for item in filter(None, tail.split(",")):
        key, _, value = item.partition("=")
        read = row.parameters.get(key.strip())
        if read is None:
            known = ", ".join(row.parameters) or "none"
            raise TargetError(f"method {name} has no parameter {key!r}; it has {known}.")
        try:
            number = read(value)
        except ValueError:
            number = math.nan
        if not value or (isinstance(number, float) and not math.isfinite(number)):
            raise TargetError(f"method {name}: {key}={value!r} is not a valid {read.__name__}.")
        parameters[key.strip()] = number
    try:
        return Method(name, parameters, row.build(**parameters))
    except TypeError:
        needed = ", ".join(f"{key}=…" for key in row.parameters if key not in parameters)
        raise TargetError(f"method {name} needs {needed}: write {name}:{needed}.") from None
