"""How near a written prediction came to the checkpoint that the run really reached later.

The window may be pruned by then, so none of it is read: the base, the copy of the last observed checkpoint, the
prediction and the real checkpoint are, side by side and once, each in its own layout and precision. What is compared
are deltas as everywhere: where the checkpoints are coarser than the base, a real checkpoint and a copy of one are
subtracted from the rounded base, and a combination, which was added to the base as it is, from that.

Shape suffix: N = elements of a chunk.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from relex.errors import NonFiniteError
from relex.forecast import Forecast, forecast
from relex.gram import measure
from relex.layouts.weights import Weights
from relex.output import manifest
from relex.output.materialise import Output, materialise
from relex.predictors import parse_method
from relex.progress import Progress
from relex.store import Checkpoint, check_same_tensors, open_base
from relex.streaming import CHUNK, Block, Unit, Workspace, as_bytes, in_order, units, workspaces
from relex.trajectory import TensorSpec, Trajectory, tensors_of

# What a manifest calls the method of a real checkpoint: nothing is predicted.
OBSERVED = "observed"
# What a thread holds besides the workspace: chunks as they are stored, their deltas, and what becomes of those.
_BUFFERS = 10


@dataclass(frozen=True)
class Drift:
    """A prediction, as it was written, against the real checkpoint; all tensors together.

    `skill` is 1 - |predicted - real|² / |observed - real|²: above 0 is nearer than the last observed checkpoint; None
    where the run has not moved since. `cosine` is between the predicted and the real delta, None where one is zero;
    `norm_ratio` is the predicted norm over the real one, None where the run is at its base; `norm` is the real delta's,
    `norm_band` the 90 % band of it that was predicted. `rounding` is how much skill the precision of the output has
    cost at most: 0 where the checkpoints are no finer than the base.
    """

    skill: float | None
    cosine: float | None
    norm_ratio: float | None
    norm: float
    norm_band: tuple[float, float] | None
    rounding: float

    @property
    def in_band(self) -> bool | None:
        """Whether the run went as far as was predicted; None where no band was."""
        return None if self.norm_band is None else self.norm_band[0] <= self.norm <= self.norm_band[1]


@dataclass(frozen=True)
class _Written:
    weights: Weights
    forecast: Forecast

    @classmethod
    def open(cls, directory: Path, base: Weights) -> "_Written":
        weights = open_base(directory)
        check_same_tensors(weights, base)
        return cls(weights, manifest.read(directory).forecast)

    def delta(self, spec: TensorSpec, base_N: Tensor, start: int, *, dtype: torch.dtype) -> Tensor:
        """Return what elements from `start` on add to the base, in `dtype`."""
        # Who was predicted before fused experts were taken one by one has them in one.
        forecasts = self.forecast.tensors
        source = forecasts[spec.name if spec.name in forecasts else spec.stored.name].source
        if source == "base":
            return torch.zeros(len(base_N), dtype=dtype)
        entry = self.weights.tensors[spec.stored.name]
        stored_N = torch.empty(len(base_N), dtype=entry.dtype)
        self.weights.read_into(entry, (spec.start + start) * entry.dtype.itemsize, as_bytes(stored_N))
        rounded = source == "latest" and _finer(base_N.dtype, spec.dtype)
        return stored_N.to(dtype) - (base_N.to(spec.dtype) if rounded else base_N).to(dtype)


class _Sums(NamedTuple):
    """Squared distances to the real checkpoint and squared norms; what rounding the real one alone would change."""

    missed: float
    waited: float
    real: float
    predicted: float
    inner: float
    rounding: float

    def plus(self, other: "_Sums") -> "_Sums":
        return _Sums(*(one + more for one, more in zip(self, other, strict=True)))


_NOTHING = _Sums(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def drift(
    base: Weights,
    real: Checkpoint,
    *,
    predicted: Path,
    observed: Path,
    memory: int,
    threads: int,
    on_progress: Progress | None = None,
) -> Drift:
    """Compare the prediction and the copy of the last observed checkpoint in two directories with the real checkpoint.

    One pass within `memory` bytes. Raises OutputError when a directory has no manifest, NonFiniteError when a tensor is
    not finite, CheckpointChangedError when a file changed meanwhile, CheckpointMismatchError, MemoryBudgetError.
    """
    models = [_Written.open(directory, base) for directory in (observed, predicted)]
    trajectory = _alone(base, real)
    spaces = workspaces(trajectory, 1, memory=memory, threads=threads, extra=_BUFFERS * CHUNK * 8)
    pieces = [unit for unit in units(trajectory) if trajectory.tensors[unit.tensor].moves]
    total = sum(unit.stop - unit.start for unit in pieces)
    sums, done = _NOTHING, 0
    for unit, part in in_order(partial(_compare, trajectory, models), pieces, spaces):
        if not all(map(math.isfinite, part)):
            name = trajectory.tensors[unit.tensor].name
            raise NonFiniteError(
                f"{real.weights.directory} or {predicted}: {name} holds NaN or infinity at step {real.step}. If it is"
                " the run's, it has diverged there: go back to a checkpoint before it."
            )
        sums = sums.plus(part)
        done += unit.stop - unit.start
        if on_progress is not None:
            on_progress(done, total)
    for weights in (trajectory.base, real.weights, *(model.weights for model in models)):
        weights.check_unchanged()
    return _drift(sums, models[1].forecast)


def write_as_predicted(
    base: Weights, real: Checkpoint, out: Path, *, memory: int, threads: int, dtype: str | None = None
) -> None:
    """Write a real checkpoint as predictions are, with the base's tokenizer, unless it is there.

    It is stored in `dtype` (None: in the base's).

    That is a plain model directory, whatever the layout and wherever it lies; its manifest says that it was observed.
    Raises as `materialise` does.
    """
    trajectory = _alone(base, real)
    gram = measure(trajectory, memory=memory, threads=threads)
    made = replace(
        forecast(trajectory, gram, parse_method("hold"), target_step=real.step, dtype=dtype),
        method=OBSERVED,
        description={"name": OBSERVED},
    )
    materialise(trajectory, [Output(made, out)], contents=gram.contents, memory=memory, threads=threads)


def _alone(base: Weights, real: Checkpoint) -> Trajectory:
    check_same_tensors(real.weights, base)
    return Trajectory(base, (real,), tensors_of(base, [real]))


def _compare(trajectory: Trajectory, models: Sequence[_Written], space: Workspace, unit: Unit) -> _Sums:
    spec = trajectory.tensors[unit.tensor]
    sums = _NOTHING
    for block in space.blocks(trajectory, unit, range(0 if spec.unchanged else 1)):
        for place, delta_N in _real(space, block):
            base_N, start = block.base[place], block.start + place.start
            real_N = delta_N.double()
            observed_N, predicted_N = (
                model.delta(spec, base_N, start, dtype=delta_N.dtype).double() for model in models
            )
            lost = 0.0
            if _finer(spec.dtype, base_N.dtype):
                moved_N = real_N + base_N
                lost = _square(moved_N.to(base_N.dtype) - moved_N)
            sums = sums.plus(
                _Sums(
                    missed=_square(predicted_N - real_N),
                    waited=_square(observed_N - real_N),
                    real=_square(real_N),
                    predicted=_square(predicted_N),
                    inner=float(predicted_N @ real_N),
                    rounding=lost,
                )
            )
    return sums


def _real(space: Workspace, block: Block) -> Iterator[tuple[slice, Tensor]]:
    for place, deltas in space.subtract(block):
        # What an adapter leaves alone has no row.
        yield place, deltas[0] if len(deltas) else torch.zeros(place.stop - place.start, dtype=torch.float32)


def _finer(one: torch.dtype, other: torch.dtype) -> bool:
    return torch.finfo(one).eps < torch.finfo(other).eps


def _square(vector_N: Tensor) -> float:
    return float(vector_N @ vector_N)


def _drift(sums: _Sums, predicted: Forecast) -> Drift:
    real, norm = math.sqrt(sums.real), math.sqrt(sums.predicted)
    return Drift(
        skill=1.0 - sums.missed / sums.waited if sums.waited > 0 else None,
        cosine=sums.inner / (real * norm) if real > 0 and norm > 0 else None,
        norm_ratio=norm / real if real > 0 else None,
        norm=real,
        norm_band=predicted.norm_band,
        rounding=sums.rounding / sums.waited if sums.waited > 0 else 0.0,
    )
