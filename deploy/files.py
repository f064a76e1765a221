"""File: written so that its path is complete or as it was, even after a power cut.

Until it is complete it is called .NAME.partial, which deploy.reaper clears away where a killed process left one.
"""

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write `text` in the place of whatever `path` holds, whose directories are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(path)
    unfinished.write_text(text)
    flush(unfinished)
    unfinished.replace(path)
    # What is written next may say that this file is there.
    flush(path.parent)


def unfinished_path(path: Path) -> Path:
    """Return where a file is made that shall be `path`."""
    return path.with_name(f".{path.name}.partial")


def flush(path: Path) -> None:
    """Have a file, or the names in a directory, on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
