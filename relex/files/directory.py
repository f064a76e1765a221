"""A directory of files, wherever it lies: what is in it, which version, and ranges of bytes."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from relex.errors import CheckpointMismatchError

# No file that is read whole is larger: the index of a model of 10^12 parameters has 20 MB, the tokenizer of the largest
# vocabularies 40, a trainer's log of 10^5 entries too.
MOST_WHOLE = 100_000_000


class Kind(StrEnum):
    """How files come to be there, which decides when a checkpoint is complete.

    DISK: they grow, in the order they are written. OBJECTS: each appears whole, in any order. COMMIT: all at once.
    """

    DISK = "disk"
    OBJECTS = "objects"
    COMMIT = "commit"


@dataclass(frozen=True)
class FileIdentity:
    """What a file was when it was looked at: name, size in bytes, modification time in ns, and version.

    The version is the inode on a disk, and elsewhere what the store itself calls a version (ETag, content digest).
    Where a file system says so, `changed_ns` is when anything of the file last changed, which nobody can put back,
    and `links` how many names it has.
    """

    name: str
    size: int
    mtime_ns: int
    version: str
    changed_ns: int = 0
    links: int = 0

    def is_still(self, was: "FileIdentity") -> bool:
        """Whether a file is what it was: one more name, or one less, changes nothing but that."""
        known = (self.name, self.size, self.mtime_ns, self.version)
        return known == (was.name, was.size, was.mtime_ns, was.version) and untouched(
            (self.changed_ns, self.links), (was.changed_ns, was.links)
        )


def untouched(now: tuple[int, int], was: tuple[int, int]) -> bool:
    """Whether `changed_ns` is what it was, or another because the number of links is."""
    return now[0] == was[0] or now[1] != was[1]


class Directory(Protocol):
    """One directory. Its string is the location that `open_directory` takes; equal locations are equal, and hash.

    On a disk only a regular file of the tree, links resolved, is ever opened, and CheckpointMismatchError raised for
    another. What fails for a moment is tried again, and raises UnreachableError when it goes on failing.
    """

    def __hash__(self) -> int: ...

    @property
    def kind(self) -> Kind:
        """How files come to be in it."""

    @property
    def name(self) -> str:
        """The last part of its location."""

    def exists(self) -> bool:
        """Whether it is there."""

    def files(self) -> Mapping[str, FileIdentity]:
        """Return the files directly in it by name, links followed; a link to nothing is not among them."""

    def children(self) -> tuple[str, ...]:
        """Return the sorted names of the directories directly in it."""

    def enter(self, name: str) -> "Directory":
        """Return the directory `name` in it, there or not."""

    def checkpoint(self, name: str) -> "Directory":
        """Return the directory `name` in it as a tree of its own, whose links may not lead out of it."""

    def identity(self, name: str) -> FileIdentity:
        """Look at one file again; raises FileNotFoundError."""

    def check(self, name: str) -> None:
        """Raise CheckpointMismatchError for a file that may not be opened, or is too large to be read whole."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes `start` to `stop` of a file (None: to its end); fewer where it ends before.

        A file of more than MOST_WHOLE bytes is not read to its end: CheckpointMismatchError.
        """

    def read_into(self, name: str, position: int, buffer: memoryview) -> int:
        """Fill `buffer` with the bytes from `position` on and return how many there were; raises OSError."""

    def last_change(self) -> float:
        """Return when anything in it last changed, in seconds since the epoch."""

    def newest_file(self) -> int:
        """Return when the newest of the files in it, at any depth, was written (ns since the epoch), 0 without any."""

    def hole(self, file: FileIdentity) -> int | None:
        """Return the first byte of a file that was never written although its length is right, None without one."""


def check_whole(directory: Directory, name: str, size: int) -> None:
    """Raise CheckpointMismatchError for a file of too many bytes to be read whole."""
    if size > MOST_WHOLE:
        raise CheckpointMismatchError(
            f"{directory}/{name} has {size} bytes, and what is read whole has at most {MOST_WHOLE}. It is no such file:"
            " delete it, or save the checkpoint again."
        )
