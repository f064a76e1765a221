"""A model that lies in a store, as a directory of this machine: for what can only read those."""

import fcntl
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relex.errors import CheckpointChangedError
from relex.files.directory import Directory, FileIdentity
from relex.files.location import is_remote
from relex.files.whole import room_for
from relex.layouts.hf import INDEX_FILE
from relex.layouts.weights import Weights
from relex.output.writer import side_files
from relex.store import open_base

_RANGE = 8 << 20
_RANGES_AT_ONCE = 8


def local_model(location: str | Path, directory: Path) -> Path:
    """Return where the model at `location` lies on this machine: there, or in a copy in `directory`, made if missing.

    The copy is complete or absent, and the only one in `directory`. Raises CheckpointError when it is no model,
    CheckpointChangedError when it changed meanwhile, UnreachableError, OutputError when
    the disk is full.
    """
    if not is_remote(location):
        return Path(location)
    model = open_base(location)
    copy = directory / model.identity[:16]
    directory.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if copy.exists():
            return copy
        # Of another version, or half of this one.
        for leftover in directory.iterdir():
            shutil.rmtree(leftover)
        partial = directory / f".{copy.name}.partial"
        try:
            with room_for(sum(file.size for file in model.files), copy, partial=partial):
                _copy(model, partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(copy)
        os.fsync(lock)
    finally:
        os.close(lock)
    return copy


def _copy(model: Weights, partial: Path) -> None:
    partial.mkdir()
    for name, content in side_files(model, model).items():
        partial.joinpath(name).write_bytes(content)
    for file in model.files:
        _fetch(model.directory, file, partial / file.name)
    if INDEX_FILE in model.directory.files():
        partial.joinpath(INDEX_FILE).write_bytes(model.directory.read(INDEX_FILE))
    model.check_unchanged()


def _fetch(directory: Directory, file: FileIdentity, path: Path) -> None:
    with path.open("wb") as target, ThreadPoolExecutor(_RANGES_AT_ONCE) as pool:
        starts = range(0, file.size, _RANGE)
        # A file of many gigabytes is in memory only as far as its ranges are on their way.
        for first in range(0, len(starts), _RANGES_AT_ONCE):
            several = starts[first : first + _RANGES_AT_ONCE]
            for content in pool.map(lambda start: directory.read(file.name, start, start + _RANGE), several):
                target.write(content)
        if target.tell() != file.size:
            raise CheckpointChangedError(
                f"{directory}/{file.name} had {file.size} bytes and {target.tell()} came: it was cut while being read."
                " Run again when it is whole."
            )
        target.flush()
        os.fsync(target.fileno())
