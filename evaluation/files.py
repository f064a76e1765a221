"""File: written so that its path is complete or as it was, even after a power cut.

Until then it is hidden and locked; what a killed process left hidden goes when its file is written again.
"""

import contextlib
import fcntl
import glob
import os
import time
from pathlib import Path

# Between making a file and locking it.
_YOUNG_SECONDS = 60.0


def write_file(path: Path, text: str) -> None:
    """Write `text` (UTF-8) in the place of whatever `path` holds; its directory is there."""
    _sweep(path)
    # Several processes may write one file, each a whole one.
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    with hidden.open("w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
            hidden.replace(path)
        except BaseException:
            hidden.unlink(missing_ok=True)
            raise


def _sweep(path: Path) -> None:
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*"):
        with contextlib.suppress(FileNotFoundError, BlockingIOError), leftover.open("rb") as file:
            if time.time() - os.fstat(file.fileno()).st_mtime > _YOUNG_SECONDS:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                leftover.unlink()
