"""A predicted model in an object store, which no loader takes for one before it is whole.

First goes a claim, which says whose objects these are; then shards and side files, then the manifest; the index, or the
only weight file, is last. A killed upload is taken up by the next call for the same prediction.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

from relex.errors import OutputError
from relex.files.object_store import open_store
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE
from relex.layouts.peft import WEIGHTS_FILE as ADAPTER_FILE
from relex.output import manifest
from relex.output.writer import try_lock

CLAIM = "relex.upload"

# Without it no loader finds weights.
_LAST = (INDEX_FILE, SINGLE_FILE, ADAPTER_FILE)


def check_destination(location: str) -> None:
    """Refuse a place that nothing can be written to; raises OutputError, StoreError or UnreachableError."""
    if location.startswith("hf://"):
        raise OutputError(
            f"output {location} cannot be: relex does not write to the Hub. Give a directory, s3:// or gs://, then"
            " upload it with hf upload."
        )
    open_store(location).list()


@contextlib.contextmanager
def staged(location: str, staging: Path) -> Iterator[Path]:
    """Yield where the prediction for `location` is to be written on this machine; it is gone once this ends well.

    What an earlier call left there is taken up, what one for another location left is removed. Raises OutputError when
    another process is at work for the same location.
    """
    place = staging / sha256(location.encode()).hexdigest()[:16]
    place.mkdir(parents=True, exist_ok=True)
    for leftover in staging.iterdir():
        if leftover != place and (lock := try_lock(leftover)) is not None:
            shutil.rmtree(leftover)
            os.close(lock)
    lock = try_lock(place)
    if lock is None:
        raise OutputError(f"output {location} is being written by another process. Wait for it, or give another --out.")
    try:
        yield place / location.rpartition("/")[2]
        shutil.rmtree(place)
    finally:
        os.close(lock)


def is_uploaded(location: str, digest: str) -> bool:
    """Whether the prediction named `digest` lies there, whole; False when nothing does or only a part of it.

    Raises OutputError when something else is there.
    """
    store = open_store(location)
    present = store.list()
    if manifest.FILE_NAME in present:
        published = manifest.read(location)
        if published.digest == digest:
            whole = all(
                name in present and present[name].size == record.size for name, record in published.files.items()
            )
            if whole and CLAIM in present:
                store.remove(CLAIM)
            return whole
        what = f"the prediction {published.digest[:12]}…, not {digest[:12]}…"
    elif CLAIM in present:
        claimed = store.fetch(CLAIM, 0, present[CLAIM].size).decode(errors="replace")
        if claimed == digest:
            return False
        what = f"an unfinished upload of the prediction {claimed[:12]}…, not {digest[:12]}…"
    elif not present:
        return False
    else:
        what = "something relex did not write"
    raise OutputError(f"output {location} exists and holds {what}. Delete it, or give another --out.")


def discard_other(directory: Path, digest: str) -> None:
    """Remove what lies in `directory` when it is not the prediction named `digest`: an earlier call did not send it."""
    if directory.exists() and manifest.read(directory).digest != digest:
        shutil.rmtree(directory)


def upload(directory: Path, location: str) -> None:
    """Send the predicted model in `directory` to `location`."""
    made = manifest.read(directory)
    store = open_store(location)
    store.send(made.digest.encode(), CLAIM)
    last = next(name for name in _LAST if name in made.files)
    for name in (*sorted(made.files.keys() - {last}), manifest.FILE_NAME, last):
        store.send(directory / name, name)
    present = store.list()
    for name, record in made.files.items():
        size = present[name].size if name in present else None
        if size != record.size:
            raise OutputError(f"{location}/{name} has {size} bytes once sent and {record.size} here. Run again.")
    store.remove(CLAIM)
