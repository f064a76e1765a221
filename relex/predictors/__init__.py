"""Methods by name: each turns the Grams of tensors, the steps and a target into K coefficients a tensor and reads no
weights; matrix methods add a rank-one matrix to each, for which they do.

A family is one module; a method is a row of METHODS: a family with some parameters fixed and some left to the user.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from relex.errors import TargetError
from relex.predictors.alpha_rl import with_accuracies
from relex.predictors.coordinates import Coordinates
from relex.predictors.low_rank import LowRankLinear
from relex.predictors.mean import Mean
from relex.predictors.neural import Neural
from relex.predictors.next import Next
from relex.predictors.predictor import Predictor
from relex.predictors.raw import RawLinear
from relex.predictors.reconstruct import Reconstruct
from relex.predictors.saturating import Saturating
from relex.predictors.secant import LateSecant, Secant
from relex.predictors.travel import Travel
from relex.trajectory import Trajectory


@dataclass(frozen=True)
class Row:
    """One line of METHODS: what it is, what builds it, which parameters may be given and how they are read.

    `paper` is an arXiv number. `backtest` says whether the backtest may ask it what it would have predicted: yes; on
    demand, when `relex backtest` names it; no. `why` is the reason of the last two.
    """

    summary: str
    build: Callable[..., Predictor]
    parameters: Mapping[str, Callable[[str], Any]]
    paper: str = ""
    backtest: Literal["yes", "on demand", "no"] = "yes"
    why: str = ""

    @property
    def defaults(self) -> dict[str, Any]:
        """The default of each parameter; one that has to be given is left out, one that may be left out is None."""
        known = inspect.signature(self.build).parameters
        return {
            name: known[name].default for name in self.parameters if known[name].default is not inspect.Parameter.empty
        }

    @property
    def written(self) -> str:
        """The parameters as a spec has them, each with its default: `rank=1,damping=1.0`; `alpha=…` without one."""
        defaults = self.defaults
        shown = {name: "…" if defaults.get(name) is None else f"{defaults[name]}" for name in self.parameters}
        return ",".join(f"{name}={value}" for name, value in shown.items())


def _first_update(alpha: float) -> Predictor:
    return Secant(end="first", beta=alpha)


def _expo(alpha: float = 2.0) -> Predictor:
    return Secant(beta=1.0 + alpha)


METHODS: Mapping[str, Row] = {
    "relex": Row(
        "straight line in the step through the leading singular coordinates, rebuilt from the base",
        LowRankLinear,
        {"rank": int},
        paper="2605.21468",
    ),
    "relex-pinned": Row(
        "the same line's slope, added to the latest checkpoint and damped",
        partial(LowRankLinear, anchor="latest"),
        {"rank": int, "damping": float},
    ),
    "polynomial": Row(
        "polynomial in the step through the leading coordinates of the last checkpoints (0: all), refit checkpoints at"
        " a time (0: at once)",
        Coordinates,
        {"rank": int, "degree": int, "last": int, "refit": int},
        paper="2605.21468",
    ),
    "sinusoid": Row(
        "sinusoid through the leading coordinates of the last checkpoints (0: all), refit checkpoints at a time",
        partial(Coordinates, curve="sinusoid"),
        {"rank": int, "last": int, "refit": int},
        paper="2605.21468",
        backtest="on demand",
        why="every jump fits a curve to every tensor",
    ),
    "neural": Row(
        "3-layer Transformer on the leading coordinates of all tensors, trained on the window; minutes on a core",
        Neural,
        {"rank": int, "epochs": int, "seed": int},
        paper="2605.21468",
        backtest="on demand",
        why="every jump trains a network",
    ),
    "secant": Row(
        "line from the checkpoint nearest a share of the latest step (0: the base) through the latest",
        LateSecant,
        {"share": float},
    ),
    "travel": Row(
        "the same line, the jump J damped to T (1 - exp(-J / T)), T = 0.0015 / lr; lr is read from the trainer's state,"
        " else from the weights",
        Travel,
        {"share": float, "lr": float},
        backtest="no",
        why="it reads the learning rate, and a backtest has only Grams",
    ),
    "saturating": Row(
        "curve a (1 - exp(-s / tau)) in the step through the leading singular coordinate, zero at the base",
        Saturating,
        {},
    ),
    "raw": Row("least-squares line through every parameter", RawLinear, {}),
    "weight-extrapolation": Row(
        "line from step start (0: the base) through the latest checkpoint, norms copied",
        partial(Secant, norms="copy"),
        {"start": int},
        paper="2601.04537",
    ),
    "expo": Row("latest difference × (1 + alpha), whatever the target", _expo, {"alpha": float}, paper="2404.16792"),
    "first-update": Row(
        "first difference × alpha, whatever the target: the cheap baseline", _first_update, {"alpha": float}
    ),
    "mean": Row("average of the last checkpoints", Mean, {"last": int}),
    "reconstruct": Row(
        "no prediction: an observed checkpoint within the leading directions, to see what they leave out",
        Reconstruct,
        {"rank": int},
        paper="2605.21468",
        backtest="no",
        why="it predicts nothing",
    ),
    "alpha-rl": Row(
        "leading left vector of each attention and MLP matrix regressed on the step, or on measured accuracies (a JSON"
        " file, step: accuracy) read at goal; all else copied",
        with_accuracies,
        {"accuracies": str, "goal": float},
        paper="2510.00553",
        backtest="no",
        why="it reads the weights, and a backtest has only their Grams",
    ),
    "next": Row(
        "networks learn each matrix's leading direction ahead checkpoints later, × alpha, whatever the target;"
        " embeddings longer than 32768 copied",
        Next,
        {"alpha": float, "ahead": int, "epochs": int, "seed": int},
        paper="2604.11446",
        backtest="no",
        why="it reads the weights, and a backtest has only their Grams",
    ),
    "hold": Row("the latest checkpoint itself: the baseline to beat", Mean, {}),
}


def option_help() -> str:
    """Return what the help of an option says that takes a method: how it is written, and every method there is."""
    rows = (f"{name} ({row.written})" if row.parameters else name for name, row in METHODS.items())
    return f"NAME or NAME:parameter=value,…; one of {', '.join(rows)}. See relex methods."


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

    def informed(self, trajectory: Trajectory, *, memory: int, threads: int) -> "Method":
        """Return the method with what it needs to know of the run besides Grams and steps. Raises RelexError."""
        if not isinstance(self.predictor, Travel):
            return self
        return replace(self, predictor=self.predictor.informed(trajectory, memory=memory, threads=threads))

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
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
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
