"""A directory that is not on this machine: as one listing of its store shows it, read by ranges.

Everything below it is listed once, when it is first looked into, and what is entered from it shares that listing: one
look at a training run is one listing, whatever the number of its checkpoints.
"""

import errno
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Protocol

from relex.files.block_cache import BlockCache
from relex.files.directory import FileIdentity, Kind, check_whole

# As much as a header, a config or an index has: one request brings it.
_OPENING = 256 << 10


class Store(Protocol):
    """The files below one location, by their paths from there. All raise UnreachableError when it cannot be asked."""

    @property
    def kind(self) -> Kind:
        """How files come to be in it."""

    def list(self) -> Mapping[str, FileIdentity]:
        """Ask for every file there is now."""

    def look(self, path: str) -> FileIdentity:
        """Ask for one file as it is now; raises FileNotFoundError."""

    def fetch(self, path: str, start: int, stop: int) -> bytes:
        """Return bytes `start` to `stop`, fewer where the file ends before; raises FileNotFoundError."""


@dataclass(frozen=True)
class Tree:
    """The files of a directory and the directories in it, by name."""

    files: dict[str, FileIdentity] = field(default_factory=dict)
    trees: "dict[str, Tree]" = field(default_factory=dict)

    @classmethod
    def of(cls, files: Mapping[str, FileIdentity]) -> "Tree":
        """Grow the tree of files that are named by their paths."""
        root = cls()
        for path, identity in sorted(files.items()):
            *parents, name = path.split("/")
            tree = root
            for parent in parents:
                tree = tree.trees.setdefault(parent, cls())
            tree.files[name] = identity
        return root

    def newest(self) -> int:
        """Return the last modification time in it in ns, 0 when it is empty."""
        times = [file.mtime_ns for file in self.files.values()]
        return max((*times, *(tree.newest() for tree in self.trees.values())), default=0)


@dataclass(frozen=True)
class RemoteDirectory:
    """A directory in a store. `blocks` keeps what is read in bulk; without, every read is a request of its own."""

    location: str
    store: Store = field(compare=False, repr=False)
    blocks: BlockCache | None = field(compare=False, repr=False)
    path: str = field(default="", compare=False)
    listed: Tree | None = field(default=None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.location

    @property
    def kind(self) -> Kind:
        """How files come to be in the store."""
        return self.store.kind

    @property
    def name(self) -> str:
        """The last part of the location."""
        return self.location.rpartition("/")[2]

    @cached_property
    def tree(self) -> Tree:
        """What is below it, as it was listed."""
        return self.listed if self.listed is not None else Tree.of(self.store.list())

    def exists(self) -> bool:
        """Whether anything is below it: stores know files only."""
        return bool(self.tree.files or self.tree.trees)

    def files(self) -> Mapping[str, FileIdentity]:
        """Return the files directly in it by name."""
        return self.tree.files

    def children(self) -> tuple[str, ...]:
        """Return the sorted names of the directories directly in it."""
        return tuple(sorted(self.tree.trees))

    def enter(self, name: str) -> "RemoteDirectory":
        """Return the directory `name` in it, as it was listed."""
        inside = self.tree.trees.get(name, Tree())
        return RemoteDirectory(f"{self.location}/{name}", self.store, self.blocks, f"{self.path}{name}/", inside)

    def checkpoint(self, name: str) -> "RemoteDirectory":
        """Return the directory `name` in it: stores have no links."""
        return self.enter(name)

    def check(self, name: str) -> None:
        """Compare the size of a file, as it was listed, with what is read whole."""
        check_whole(self, name, self._listed(name).size)

    def identity(self, name: str) -> FileIdentity:
        """Ask for one file as it is now."""
        return self.store.look(self.path + name)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes `start` to `stop` of a file; small files, and the beginning of large ones, are remembered."""
        file = self._listed(name)
        if stop is None:
            check_whole(self, name, file.size)
        stop = file.size if stop is None else min(stop, file.size)
        if stop <= _OPENING:
            opening = _small_file if file.size <= _OPENING else _opening
            return opening(self, file)[start:stop]
        return self.store.fetch(self.path + name, start, stop)

    def read_into(self, name: str, position: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `position` on and return how many there were."""
        file = self._listed(name)
        fetch = partial(self.store.fetch, self.path + name)
        if self.blocks is not None:
            return self.blocks.read_into((self.location, file), position, buffer, size=file.size, fetch=fetch)
        content = fetch(position, min(position + len(buffer), file.size))
        buffer[: len(content)] = content
        return len(content)

    def last_change(self) -> float:
        """Return when anything in it last changed, in seconds since the epoch; 0 where stores keep no times."""
        return self.tree.newest() / 1e9

    def newest_file(self) -> int:
        """Return when the newest file in it was written (ns since the epoch); 0 where stores keep no times."""
        return self.tree.newest()

    def hole(self, file: FileIdentity) -> int | None:
        """Return None: stores have no holes."""

    def _listed(self, name: str) -> FileIdentity:
        identity = self.tree.files.get(name)
        if identity is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.location}/{name}")
        return identity


@lru_cache(maxsize=1024)  # a watcher reads the same config.json of every checkpoint every few seconds
def _small_file(directory: RemoteDirectory, file: FileIdentity) -> bytes:
    return directory.store.fetch(directory.path + file.name, 0, file.size)


@lru_cache(maxsize=64)  # the length of a header and the header are two reads, one after the other
def _opening(directory: RemoteDirectory, file: FileIdentity) -> bytes:
    return directory.store.fetch(directory.path + file.name, 0, _OPENING)
