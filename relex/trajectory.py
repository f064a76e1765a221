"""A base and the ordered checkpoints that agree with it."""

import itertools
import math
import time
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from relex.errors import CheckpointMismatchError, StoreError
from relex.files.block_cache import BlockCache
from relex.files.location import open_directory
from relex.layouts import experts
from relex.layouts.detection import open_any
from relex.layouts.factors import AdapterWeights, LowRank, Unchanged
from relex.layouts.weights import TensorEntry, Weights, embedding_name
from relex.store import Checkpoint, check_same_tensors, observed, open_base, scan

# One comparison of a stored head with its embedding; as much as a read.
_COMPARED_BYTES = 1 << 20


@dataclass(frozen=True)
class Place:
    """Where one expert's matrix lies in the tensor of fused experts that is `stored`: from element `start` on.

    `turned` when it is stored as (in, out).
    """

    stored: TensorEntry
    start: int
    turned: bool


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model, as the base and as every checkpoint store it (one entry a checkpoint, in step order).

    `within` is there when it is one expert's matrix, of experts that are stored fused.
    """

    base: TensorEntry
    entries: tuple[TensorEntry, ...]
    within: Place | None = None

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.base.name

    @property
    def stored(self) -> TensorEntry:
        """The tensor of the base's files that it is, or that it lies in."""
        return self.base if self.within is None else self.within.stored

    @property
    def start(self) -> int:
        """The element of the stored tensor that it begins at."""
        return 0 if self.within is None else self.within.start

    @property
    def count(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.base.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every checkpoint's copy."""
        return self.entries[0].dtype

    @property
    def moves(self) -> bool:
        """Whether arithmetic is done on it: integers and booleans are copied."""
        return self.dtype.is_floating_point

    @property
    def unchanged(self) -> bool:
        """Whether no checkpoint stores it: an adapter that leaves it as the base has it."""
        return isinstance(self.entries[0], Unchanged)

    @property
    def relative(self) -> bool:
        """Whether the checkpoints store what is added to the base, in fp32, and not the tensor itself."""
        return isinstance(self.entries[0], LowRank)

    @property
    def adapted(self) -> tuple[LowRank, ...]:
        """The factors of what is added to the base, a checkpoint each; () when the tensor is stored otherwise."""
        return tuple(entry for entry in self.entries if isinstance(entry, LowRank))


@dataclass(frozen=True)
class Trajectory:
    """A base and at least two checkpoints at increasing steps whose tensors agree with it by name, shape and dtype."""

    base: Weights
    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps, increasing."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    @property
    def adapters(self) -> tuple[AdapterWeights, ...]:
        """The weights of the checkpoints when they are adapters; () when they are whole models."""
        weights = (checkpoint.weights for checkpoint in self.checkpoints)
        return tuple(each for each in weights if isinstance(each, AdapterWeights))

    @property
    def inputs(self) -> str:
        """Hex digest of which files the weights are in, without reading them."""
        weights = (self.base, *(checkpoint.weights for checkpoint in self.checkpoints))
        return sha256(" ".join(each.identity for each in weights).encode()).hexdigest()

    def check_unchanged(self) -> None:
        """Compare every file with what it was when the trajectory was opened; raises CheckpointChangedError."""
        for weights in (self.base, *(checkpoint.weights for checkpoint in self.checkpoints)):
            weights.check_unchanged()


def open_run(
    run: str | Path, base: str | Path, *, window: int | None = None, blocks: BlockCache | None = None
) -> Trajectory:
    """Open the complete checkpoints of a training run at steps up to `window` (None: all) on their base.

    `blocks` is where what is read from a URL is kept meanwhile. Raises RelexError.
    """
    opened = open_base(base, blocks=blocks)
    stored = scan(run, opened, now=time.time(), blocks=blocks)
    return open_trajectory(opened, observed(stored, run, window=window))


def open_again(
    base: str,
    steps: Sequence[int],
    checkpoints: Sequence[str],
    *,
    whole: Container[str] = (),
    blocks: BlockCache | None = None,
) -> Trajectory:
    """Open a base and checkpoints, a directory a step, where they were when they were opened before.

    Fused experts whose name is in `whole` stay one tensor.
    """
    opened = open_base(base, blocks=blocks)
    again = [
        Checkpoint(step, open_any(open_directory(location, blocks=blocks), base=opened))
        for step, location in zip(steps, checkpoints, strict=True)
    ]
    return open_trajectory(opened, again, whole=whole)


def open_trajectory(base: Weights, checkpoints: Sequence[Checkpoint], *, whole: Container[str] = ()) -> Trajectory:
    """Put a base and checkpoints together; refuses what does not agree, and a tied head unlike its embedding.

    Experts that are stored fused become a tensor for each matrix of each expert, as if they were not, but for those
    whose name is in `whole`.
    """
    steps = [checkpoint.step for checkpoint in checkpoints]
    if len(steps) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise StoreError(f"a trajectory needs at least 2 checkpoints at increasing steps, and these are at {steps}.")
    for weights in (base, *(checkpoint.weights for checkpoint in checkpoints)):
        check_same_tensors(weights, base)
        _check_tied_head(weights)
    _check_one_kind(checkpoints)
    for name in base.tensors:
        entries = tuple(checkpoint.weights.tensors[name] for checkpoint in checkpoints)
        for checkpoint, other in zip(checkpoints, entries, strict=True):
            if other.dtype is not entries[0].dtype:
                raise CheckpointMismatchError(
                    f"{checkpoint.weights.directory}: {name} is {other.dtype}, at step {steps[0]} it is"
                    f" {entries[0].dtype}. One trajectory has one precision: leave out the checkpoints saved otherwise."
                )
            if type(other) is not type(entries[0]):
                raise CheckpointMismatchError(
                    f"{checkpoint.weights.directory}: {name} is {_kept_as(other)} in this adapter and"
                    f" {_kept_as(entries[0])} in that of step {steps[0]}. One trajectory adapts the same modules: leave"
                    " out the checkpoints of other settings."
                )
    return Trajectory(base, tuple(checkpoints), tensors_of(base, checkpoints, whole=whole))


def tensors_of(
    base: Weights, checkpoints: Sequence[Checkpoint], *, whole: Container[str] = ()
) -> tuple[TensorSpec, ...]:
    """Return the tensors of a base and of checkpoints that agree with it; see `open_trajectory`.

    Whatever adapters keep stays as it is.
    """
    adapters = any(isinstance(checkpoint.weights, AdapterWeights) for checkpoint in checkpoints)
    tensors: list[TensorSpec] = []
    for name, entry in base.tensors.items():
        spec = TensorSpec(entry, tuple(checkpoint.weights.tensors[name] for checkpoint in checkpoints))
        tensors += [spec] if adapters or name in whole else _by_expert(spec, base.config)
    return tuple(tensors)


def _by_expert(spec: TensorSpec, config: Mapping[str, Any]) -> list[TensorSpec]:
    """Return the matrices of a tensor of fused experts, each a tensor of its own; of another one itself."""
    cut = experts.matrices(spec.base, config) if spec.moves and spec.base.dtype.is_floating_point else ()
    if not cut:
        return [spec]
    first, *others = (experts.parts(entry, cut) for entry in (spec.base, *spec.entries))
    return [
        TensorSpec(base, tuple(entries), Place(spec.base, matrix.start, matrix.turned))
        for matrix, base, *entries in zip(cut, first, *others, strict=True)
    ]


def _check_one_kind(checkpoints: Sequence[Checkpoint]) -> None:
    first = checkpoints[0]
    for other in checkpoints:
        if isinstance(other.weights, AdapterWeights) is not isinstance(first.weights, AdapterWeights):
            whole, adapter = (first, other) if isinstance(other.weights, AdapterWeights) else (other, first)
            raise CheckpointMismatchError(
                f"the checkpoint of step {adapter.step} is an adapter ({adapter.weights.directory}) and that of step"
                f" {whole.step} a whole model ({whole.weights.directory}). One trajectory has one kind: leave out the"
                " others."
            )


def _kept_as(entry: TensorEntry) -> str:
    if isinstance(entry, LowRank):
        return "adapted"
    return "left alone" if isinstance(entry, Unchanged) else "saved whole"


def _check_tied_head(weights: Weights) -> None:
    """Refuse a config that says tied over a file whose head and embedding differ: transformers would untie them."""
    name = embedding_name(weights.tensors)
    if weights.alias is None or name is None:
        return
    embedding, head = weights.tensors[name], weights.alias
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    for start in range(0, head.nbytes if same else 0, _COMPARED_BYTES):
        size = min(_COMPARED_BYTES, head.nbytes - start)
        ours, theirs = bytearray(size), bytearray(size)
        weights.read_into(embedding, start, memoryview(ours))
        weights.read_into(head, start, memoryview(theirs))
        same = same and ours == theirs
    if not same:
        raise CheckpointMismatchError(
            f"{weights.directory}: config.json says the output head is tied, and {head.name} differs from {name}."
            " Set tie_word_embeddings to false if the run trains both, or delete the stale head."
        )
