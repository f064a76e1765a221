"""Which checkpoints of a training run exist, and which of them may be read."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from relex.errors import (
    AbsentError,
    CheckpointError,
    CheckpointIncompleteError,
    CheckpointMismatchError,
    StoreError,
    UnreachableError,
)
from relex.files.block_cache import BlockCache
from relex.files.directory import Directory, Kind
from relex.files.location import open_directory
from relex.layouts import hf
from relex.layouts.detection import open_complete
from relex.layouts.settled import QUIET_SECONDS
from relex.layouts.side_files import side_names
from relex.layouts.steps import doubtful, step_names
from relex.layouts.weights import Weights

# At once, into a store on the network.
_LOOKS = 16


class State(StrEnum):
    """READY may be read; NOT_YET may become ready; BROKEN will not without somebody's help."""

    READY = "ready"
    NOT_YET = "not yet"
    BROKEN = "broken"


@dataclass(frozen=True)
class StoredCheckpoint:
    """One step directory and its state; `weights` is there exactly when it is READY, `reason` when it is not."""

    step: int
    directory: Directory
    state: State
    reason: str = ""
    weights: Weights | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: the training step it was written at and its weights."""

    step: int
    weights: Weights


def open_base(location: str | Path | Directory, *, blocks: BlockCache | None = None) -> Weights:
    """Open the model that the training run started from; it must have a config.json.

    `blocks` is where what is read in bulk from a URL is kept meanwhile.
    """
    directory = open_directory(location, blocks=blocks) if isinstance(location, (str, Path)) else location
    if not directory.exists():
        raise CheckpointIncompleteError(
            f"base {location} is not a directory. Give the directory of the model the run started from."
        )
    try:
        if "config.json" not in directory.files():
            raise CheckpointIncompleteError(
                f"base {location} has no config.json. Give the directory of the model the run started from."
            )
        side_names(directory)
        return hf.open_model(directory, config={})
    except OSError as error:
        raise CheckpointIncompleteError(
            f"base {location}: {error.filename or directory} cannot be read ({error.strerror}). Let it be read, or"
            " give a whole copy of the model."
        ) from error


def scan(
    location: str | Path | Directory, base: Weights, *, now: float, blocks: BlockCache | None = None
) -> tuple[StoredCheckpoint, ...]:
    """Return every step directory of a run by ascending step, with its state at `now` (seconds since the epoch).

    `blocks` is where what is read in bulk from a URL is kept meanwhile.
    """
    run = open_directory(location, blocks=blocks) if isinstance(location, (str, Path)) else location
    if not run.exists():
        raise AbsentError(
            f"training run {run} is not a directory. Give the directory the trainer writes its checkpoints to."
        )
    names = step_names(run)
    doubts = doubtful([name for each in names.values() for name in each])
    steps = [(step, each) for step, each in names.items() if each[0] not in doubts]
    broken = tuple(
        StoredCheckpoint(step, run.checkpoint(each[0]), State.BROKEN, f"{run}: {doubts[each[0]]}")
        for step, each in names.items()
        if each[0] in doubts
    )
    return tuple(sorted((*_looks(steps, run, base, now), *broken), key=lambda checkpoint: checkpoint.step))


def _looks(
    steps: Sequence[tuple[int, Sequence[str]]], run: Directory, base: Weights, now: float
) -> tuple[StoredCheckpoint, ...]:
    if run.kind is Kind.DISK:
        return tuple(_look(step, names, run, base, now) for step, names in steps)
    # Each takes a few requests that wait for nothing but the network.
    with ThreadPoolExecutor(_LOOKS) as pool:
        return tuple(pool.map(lambda pair: _look(pair[0], pair[1], run, base, now), steps))


def _look(step: int, names: Sequence[str], run: Directory, base: Weights, now: float) -> StoredCheckpoint:
    """Look at the directory of one step; whatever is wrong with it is told, and concerns no other step."""
    directory = run.checkpoint(names[0])
    if len(names) > 1:
        reason = f"{run} has {len(names)} directories for step {step}: {' and '.join(names)}. Keep one."
        return StoredCheckpoint(step, directory, State.BROKEN, reason)
    try:
        try:
            weights = open_complete(step, directory, run=run, base=base, now=now)
            check_same_tensors(weights, base)
            side_names(weights.directory)
        except CheckpointError as error:
            # What is wrong in a directory that still changes may be right a second later.
            quiet = now - directory.last_change() >= QUIET_SECONDS
            return StoredCheckpoint(step, directory, State.BROKEN if quiet else State.NOT_YET, str(error))
    except FileNotFoundError:
        return StoredCheckpoint(step, directory, State.NOT_YET, f"{directory} is being removed or replaced. Wait.")
    except UnreachableError as error:
        if directory.kind is not Kind.DISK:
            raise
        return StoredCheckpoint(step, directory, State.NOT_YET, str(error))
    except OSError as error:
        reason = f"{error.filename or directory} cannot be read ({error.strerror}). Let it be read, or delete it."
        return StoredCheckpoint(step, directory, State.BROKEN, reason)
    except RecursionError:
        reason = f"{directory}: a file in it is nested too deep to be read. Save the checkpoint again."
        return StoredCheckpoint(step, directory, State.BROKEN, reason)
    return StoredCheckpoint(step, directory, State.READY, weights=weights)


def check_same_tensors(weights: Weights, base: Weights) -> None:
    """Refuse weights whose names, shapes or kinds of dtype differ from the base's, naming both sides."""
    for name, entry in base.tensors.items():
        other = weights.tensors.get(name)
        if other is None:
            raise CheckpointMismatchError(
                f"{weights.directory} has no tensor {name}, which the base {base.directory} has with shape"
                f" {list(entry.shape)}. Give the base this run was started from."
            )
        if other.shape != entry.shape:
            raise CheckpointMismatchError(
                f"{weights.directory}: {name} has shape {list(other.shape)}, the base {base.directory} has"
                f" {list(entry.shape)}. Give the base this run was started from."
            )
        if other.dtype.is_floating_point != entry.dtype.is_floating_point:
            raise CheckpointMismatchError(
                f"{weights.directory}: {name} is {other.dtype}, the base {base.directory} has {entry.dtype}."
                " Give the base this run was started from."
            )
    extra = sorted(weights.tensors.keys() - base.tensors.keys())
    if extra:
        raise CheckpointMismatchError(
            f"{weights.directory} has tensor {extra[0]} with shape {list(weights.tensors[extra[0]].shape)}, which the"
            f" base {base.directory} does not have. Give the base this run was started from."
        )


def observed(
    stored: Sequence[StoredCheckpoint], run: str | Path, *, window: int | None = None
) -> tuple[Checkpoint, ...]:
    """Return the checkpoints at steps up to and including `window` (None: all), at least two of them, all ready.

    A checkpoint inside the window that is not ready is refused, never left out: the fit would silently be another one.
    """
    inside = [checkpoint for checkpoint in stored if window is None or checkpoint.step <= window]
    if not stored:
        raise StoreError(
            f"{run} has no checkpoints: no directory in it is named checkpoint-N, step_N, global_step_N or the like."
            " Give the directory the trainer writes its checkpoints to."
        )
    for checkpoint in inside:
        if checkpoint.state is not State.READY:
            raise CheckpointIncompleteError(f"step {checkpoint.step} is {checkpoint.state}: {checkpoint.reason}")
    if len(inside) < 2:
        limit = "" if window is None else f" at or before step {window}"
        raise StoreError(
            f"{run} has {len(inside)} checkpoint{'s' if len(inside) != 1 else ''}{limit}, of {len(stored)} at steps"
            f" {stored[0].step} to {stored[-1].step};"
            " a line needs 2. Save more often, or widen the window."
        )
    return tuple(
        Checkpoint(checkpoint.step, checkpoint.weights) for checkpoint in inside if checkpoint.weights is not None
    )
