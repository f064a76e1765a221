"""A location: the path or URL of a directory, and the directory there."""

from pathlib import Path
from typing import TYPE_CHECKING

from relex.files.directory import Directory
from relex.files.local import LocalDirectory

if TYPE_CHECKING:
    from relex.files.block_cache import BlockCache


def open_directory(location: str | Path, *, blocks: "BlockCache | None" = None) -> Directory:
    """Return the directory at a path or a URL (`hf://org/repo`, `s3://bucket/prefix`, …), there or not.

    `blocks` keeps what is read in bulk from a URL; without, every read is a request of its own. Raises StoreError for a
    URL that cannot be, UnreachableError for one that needs to be asked for and does not answer.
    """
    if not is_remote(location):
        return LocalDirectory(Path(location))
    # Neither library need be there, nor is it quick to import, for who reads from a disk.
    if str(location).startswith("hf://"):
        from relex.files.hub import open_hub

        return open_hub(str(location), blocks=blocks)
    from relex.files.object_store import open_store
    from relex.files.remote import RemoteDirectory

    store = open_store(str(location))
    return RemoteDirectory(store.location, store, blocks)


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path."""
    return isinstance(location, str) and "://" in location
