"""A prediction as numbers: for every tensor, which coefficients, or which copy; of matrix methods, which vectors.

No weight is read to make one (the vectors are found before, see `matrix_updates`).

Shape suffixes: T = tensors that move, K = checkpoints.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from typing import Any, Literal

import torch
from torch import Tensor

from relex import sanity, spectrum
from relex.errors import TargetError
from relex.gram import Gram
from relex.interval import norm_band
from relex.predictors import Method
from relex.predictors.predictor import MatrixPredictor, Window
from relex.rank_one import RankOne
from relex.trajectory import TensorSpec, Trajectory

FORMAT = 1

Source = Literal["combined", "rank-one", "base", "latest"]


@dataclass(frozen=True)
class TensorForecast:
    """How one tensor is made: sum of coefficients times deltas on the base, or the base's or the latest's copy.

    `coefficients` has one fp64 number a checkpoint when `source` is combined or rank-one and is empty otherwise. To a
    rank-one tensor a matrix is added whose vectors have the digest `vectors`. `energy` is the rank-1 share of the
    squared deltas, `r_squared` that of the leading coordinate's line; None for integers and frozen tensors.
    """

    source: Source
    coefficients: tuple[float, ...] = ()
    energy: float | None = None
    r_squared: float | None = None
    vectors: str = ""


@dataclass(frozen=True)
class Forecast:
    """One predicted checkpoint. `steps`, `digests` and `coefficients` are in the order of the observed checkpoints.

    `surviving` is the share of its delta that survives the rounding to `dtype` (see relex.output.rounding), None where
    nothing is rounded. `norm` is of what is predicted, `norm_band` where the delta's norm is with 90 % if the run goes
    on along a line (see `interval`). `warnings` say what looks wrong in the window (see `sanity`), a line each.
    `copied` are the tensors that moved and that the method does not apply to, so that they are the latest checkpoint's,
    `copied_share` how much of the model's parameters they are.
    `products` is the precision of the Gram's (see `relex.kernel`), "" where nobody kept it.
    `vectors` are what is added to rank-one tensors: not among the JSON, and absent from a forecast that was read back,
    where the tensors have their digests.
    """

    method: str
    description: Mapping[str, Any]
    target_step: int
    steps: tuple[int, ...]
    base_digest: str
    digests: tuple[str, ...]
    dtype: str
    tensors: Mapping[str, TensorForecast]
    amplification: float
    norm: float
    norm_latest: float
    norm_band: tuple[float, float] | None
    energy: float
    r_squared: float
    warnings: tuple[str, ...]
    surviving: float | None = None
    products: str = ""
    copied: tuple[str, ...] = ()
    copied_share: float = 0.0
    vectors: Mapping[str, RankOne] = field(default_factory=dict, compare=False, repr=False)

    @property
    def digest(self) -> str:
        """Hex digest of everything that decides the bytes of the predicted weights, and of what they are called."""
        tensors = {
            name: [tensor.source, tensor.coefficients, *filter(None, [tensor.vectors])]
            for name, tensor in self.tensors.items()
        }
        content = {"format": FORMAT, "method": self.method, "target_step": self.target_step, "steps": self.steps}
        content |= {"base": self.base_digest, "checkpoints": self.digests, "dtype": self.dtype, "tensors": tensors}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; floats survive exactly."""
        content = asdict(replace(self, vectors={}))
        del content["vectors"]
        return content

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Forecast":
        """Read back what to_json wrote."""
        tensors = {
            name: TensorForecast(**(tensor | {"coefficients": tuple(tensor["coefficients"])}))
            for name, tensor in content["tensors"].items()
        }
        # Who was written before it was kept has none.
        lists = {key: tuple(content.get(key, ())) for key in ("steps", "digests", "warnings", "copied")}
        band = tuple(content["norm_band"]) if content["norm_band"] is not None else None
        return cls(**(dict(content) | lists | {"tensors": tensors, "norm_band": band}))


def check_target(target_step: int, steps: Sequence[int], *, inside: Literal["refuse", "allow"] = "refuse") -> None:
    """Refuse a target that is not beyond the window: what was observed need not be predicted."""
    if target_step <= 0:
        raise TargetError(f"target step is {target_step}; give a training step after {steps[-1]}.")
    if target_step <= steps[-1] and inside == "refuse":
        raise TargetError(
            f"target step {target_step} is not beyond the window, which ends at step {steps[-1]}."
            " Give a later target, a shorter window, or --allow-inside to look at the fit itself."
        )


def of_tensor(
    method: Method, steps: Sequence[int], target_step: int, spec: TensorSpec, products_KK: Tensor | None
) -> TensorForecast:
    """Return how one tensor is made, but for `energy` and `r_squared`, if the method's coefficients are by tensor.

    `products_KK` is its Gram, None where it does not move. The bits are those of `forecast`. Raises TargetError.
    """
    if products_KK is None:
        return _copied(spec)
    if not bool(products_KK.diagonal().any()):
        return TensorForecast("base")
    if not method.predictor.moves(spec.name, len(spec.base.shape)):
        return TensorForecast("latest")
    steps_K = torch.tensor(steps, dtype=torch.float64)
    coefficients_K = _coefficients(method, products_KK[None], steps_K, target_step)[0]
    return _combined(coefficients_K, _latest(len(steps)))


def _coefficients(method: Method, products_TKK: Tensor, steps_K: Tensor, target_step: int) -> Tensor:
    """Return (T, K); tensor by tensor where that is possible: the last bits depend on what else is in a batch."""
    alone = [products_TKK[place : place + 1] for place in range(len(products_TKK))]
    batches = alone if method.predictor.by_tensor else [products_TKK]
    return torch.cat([method.predictor.coefficients(Window(batch, steps_K), target_step) for batch in batches])


def _latest(count: int) -> Tensor:
    latest_K = torch.zeros(count, dtype=torch.float64)
    latest_K[-1] = 1.0
    return latest_K


def _copied(spec: TensorSpec) -> TensorForecast:
    return TensorForecast("base" if spec.unchanged else "latest")


def _combined(
    coefficients_K: Tensor, latest_K: Tensor, energy: float | None = None, r_squared: float | None = None
) -> TensorForecast:
    # The latest checkpoint is copied, not recomputed: base + (latest - base) can differ in the last bit.
    if torch.equal(coefficients_K, latest_K):
        return TensorForecast("latest", (), energy, r_squared)
    return TensorForecast("combined", tuple(coefficients_K.tolist()), energy, r_squared)


def forecast(
    trajectory: Trajectory,
    gram: Gram,
    method: Method,
    *,
    target_step: int,
    dtype: str | None = None,
    added: Mapping[str, RankOne] | None = None,
) -> Forecast:
    """Predict the checkpoint at `target_step` from a trajectory and its Gram.

    `dtype` overrides the stored precision of the result (None: the base's, tensor by tensor), `added` is what a matrix
    method adds (see `matrix_updates.added`). Raises TargetError when the method's parameters do not fit the window.
    """
    if added is None and isinstance(method.predictor, MatrixPredictor):
        raise TargetError(
            f"method {method.name} follows from the matrices themselves, and here are only their Grams. Choose another"
            " method."
        )
    added = added or {}
    gram = _by_name(gram)
    steps_K = torch.tensor(trajectory.steps, dtype=torch.float64)
    energy_T = spectrum.energy(gram.products)
    r_squared_T = spectrum.r_squared(gram.products, steps_K)
    latest_K = _latest(len(steps_K))
    specs = {spec.name: spec for spec in trajectory.tensors}
    moved_T = gram.products.diagonal(dim1=-2, dim2=-1).any(-1).tolist()
    # A tensor that never moved stays as it is: what a method makes of its zero Gram is of no account.
    predicted = [
        index
        for index, name in enumerate(gram.names)
        if moved_T[index] and method.predictor.moves(name, len(specs[name].base.shape))
    ]
    coefficients_TK = latest_K * torch.tensor(moved_T, dtype=torch.float64)[:, None]
    if predicted:
        coefficients_TK[predicted] = _coefficients(method, gram.products[predicted], steps_K, target_step)
    tensors = {spec.name: _copied(spec) for spec in trajectory.tensors}
    for index, name in enumerate(gram.names):
        if not moved_T[index]:
            tensors[name] = TensorForecast("base")
            continue
        shares = float(energy_T[index]), float(r_squared_T[index])
        if name in added:
            coefficients = tuple(coefficients_TK[index].tolist())
            tensors[name] = TensorForecast("rank-one", coefficients, *shares, added[name].digest)
        else:
            tensors[name] = _combined(coefficients_TK[index], latest_K, *shares)
    # Of what a matrix method applies to, too, it may leave out a tensor, as one that is too long.
    left_out, applied = isinstance(method.predictor, MatrixPredictor), set(predicted)
    copied = tuple(
        name
        for index, name in enumerate(gram.names)
        if moved_T[index] and (index not in applied or (left_out and name not in added))
    )
    total = sum(math.prod(spec.base.shape) for spec in trajectory.tensors)
    norm = float(spectrum.norm(gram.products, coefficients_TK))
    return Forecast(
        method=method.spec,
        description=method.describe(),
        target_step=target_step,
        steps=trajectory.steps,
        base_digest=gram.base_digest,
        digests=gram.digests,
        dtype=dtype or "base",
        tensors=tensors,
        amplification=float(coefficients_TK.abs().sum(-1).max()) if gram.names else 0.0,
        # Exact: in the order in which vectors were found, or in that in which they are kept, it is the same number.
        norm=math.sqrt(
            max(0.0, math.fsum([norm**2, *(2.0 * matrix.inner + matrix.square for matrix in added.values())]))
        ),
        norm_latest=float(spectrum.norm(gram.products, latest_K.expand_as(coefficients_TK))),
        norm_band=norm_band(gram.products, steps_K, target_step),
        energy=spectrum.pooled(gram.products, energy_T),
        r_squared=spectrum.pooled(gram.products, r_squared_T),
        warnings=tuple(finding.text for finding in sanity.findings(gram)),
        products=gram.precision,
        copied=copied,
        copied_share=sum(math.prod(specs[name].base.shape) for name in copied) / total,
        vectors=added,
    )


def _by_name(gram: Gram) -> Gram:
    """Return the Gram with its tensors in the order of their names, whatever that of the files is.

    The last bits of an eigenvector depend on where in the batch its matrix stands.
    """
    order = sorted(range(len(gram.names)), key=gram.names.__getitem__)
    names = tuple(gram.names[index] for index in order)
    return replace(gram, names=names, products=gram.products[order], base_norms=gram.base_norms[order])
