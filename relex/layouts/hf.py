"""Hugging Face checkpoints: `checkpoint-N` as Trainer and TRL write them, and plain `step_N`, `global_step_N`.

Complete means: an exact name; the marker `trainer_state.json`, which Trainer writes last, parses and is not older than
the newest weight file, or, with no marker, nothing changed for a while; every weight file whole and without holes.
"""

import contextlib
import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from relex.errors import CheckpointIncompleteError, StoreError
from relex.layouts.weights import FileIdentity, Weights, open_weights

NAME = "hf"
QUIET_SECONDS = 30.0

_STEP_DIRECTORY = re.compile(r"(?:checkpoint-|step_|global_step_?)(\d+)")
_MARKER = "trainer_state.json"
_INCOMPLETE_MARKER = "checkpoint-is-incomplete.txt"


def step_directories(run: Path) -> dict[int, Path]:
    """Return the step directories of a training run by ascending training step; other names are not looked at."""
    found: dict[int, Path] = {}
    for path in sorted(run.iterdir()):
        match = _STEP_DIRECTORY.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        step = int(match[1])
        if step in found:
            raise StoreError(
                f"{run} has two directories for step {step}: {found[step].name} and {path.name}. Keep one."
            )
        found[step] = path
    return dict(sorted(found.items()))


def open_complete(path: Path, *, config: Mapping[str, Any], now: float) -> Weights:
    """Open the weights in `path` if it is complete at time `now` (seconds since the epoch).

    Raises CheckpointIncompleteError, or CheckpointMismatchError when the files contradict each other.
    """
    if (path / _INCOMPLETE_MARKER).exists():
        raise CheckpointIncompleteError(f"{path} holds {_INCOMPLETE_MARKER}: its writer has not finished. Wait.")
    weights = open_weights(path, config=config)
    for file in weights.files:
        _refuse_hole(path / file.name, file.size)
    newest = max(file.mtime_ns for file in weights.files)
    marker = path / _MARKER
    if not marker.is_file():
        age = now - newest / 1e9
        if age < QUIET_SECONDS:
            raise CheckpointIncompleteError(
                f"{path} has no {_MARKER} and changed {max(age, 0.0):.0f} s ago; without that marker a checkpoint"
                f" counts as complete after {QUIET_SECONDS:.0f} quiet seconds. Wait."
            )
        return weights
    identity = FileIdentity.of(marker)
    _check_marker(marker, identity)
    if identity.mtime_ns < newest:
        raise CheckpointIncompleteError(
            f"{path}: the weights are newer than {_MARKER}, so they are being written again. Wait for the trainer."
        )
    return weights


@lru_cache(maxsize=4096)  # it grows with the run, and a watcher looks at every checkpoint every few seconds
def _check_marker(path: Path, identity: FileIdentity) -> None:
    try:
        json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointIncompleteError(
            f"{path} ({identity.size} bytes) does not parse ({error}): the trainer is writing it. Wait."
        ) from error


def last_change(path: Path) -> float:
    """Return when anything in directory `path` last changed, in seconds since the epoch."""
    times = [path.stat().st_mtime]
    for entry in os.scandir(path):
        # A file may go meanwhile, or be a link to nothing.
        with contextlib.suppress(FileNotFoundError):
            times.append(entry.stat().st_mtime)
    return max(times)


def _refuse_hole(path: Path, size: int) -> None:
    """Refuse a sparse file: on a network file system a hole is a part that has not arrived."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
    finally:
        os.close(descriptor)
    if hole < size:
        raise CheckpointIncompleteError(
            f"{path} has a hole at byte {hole} of {size}: that part has not been written yet. Wait for the trainer."
        )
