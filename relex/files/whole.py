"""A file that is complete or absent, and what a full disk says.

It is written under a hidden name, locked, and then renamed. What a killed process left hidden has no lock any more, and
goes when the next file is written beside it.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from relex.errors import OutputError

_SUFFIX = ".tmp"
# Between making a file and locking it.
_YOUNG_SECONDS = 60.0
# What a full disk, or a quota that is used up, says.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_whole(content: bytes, path: Path) -> None:
    """Write a file in a directory that is made when missing; raises OutputError where there is no room for it."""
    with room_for(len(content), path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        # Of the mode that any file of this user has: a trainer of somebody else may be waiting for it.
        hidden = path.with_name(f".{path.name}.{secrets.token_hex(4)}{_SUFFIX}")
        with hidden.open("xb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                hidden.replace(path)
            except BaseException:
                hidden.unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def room_for(needed: int, path: Path, *, partial: Path | None = None) -> Iterator[None]:
    """Turn a full disk, while `needed` bytes are written to `path`, into one line: OutputError.

    What lies in the directory `partial` is removed with the attempt, and counts as room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = next(parent for parent in path.absolute().parents if parent.is_dir())
        held = sum(file.stat().st_blocks for file in partial.iterdir()) * 512 if partial is not None else 0
        raise OutputError(
            f"{path} takes {needed} bytes, and {place} has room for {shutil.disk_usage(place).free + held}"
            f" ({error.strerror}). Make room, or write elsewhere; what was begun is removed."
        ) from error


def _sweep(directory: Path) -> None:
    for leftover in directory.glob(f".*{_SUFFIX}"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), leftover.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _YOUNG_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
