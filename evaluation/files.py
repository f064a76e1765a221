"""File: written so that its path is complete or as it was, even after a power cut."""

import os
from pathlib import Path


def write_file(path: Path, text: str) -> None:
    """Write `text` (UTF-8) in the place of whatever `path` holds; its directory is there."""
    # Several processes may write one file, each a whole one.
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    with hidden.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)
