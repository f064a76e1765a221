"""A lock file, held while something is worked on.

A lock of the operating system, not a file with a date in it: it goes with its process, however that ends.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def held(path: Path, *, seconds: float) -> Iterator[bool]:
    """Hold the lock `path` in the block; yields False when another process still holds it after `seconds`."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
