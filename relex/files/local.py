"""A directory of a mounted file system, whose links lead nowhere else.

A run or a model may be somebody else's, and a link in it may lead to any file of this machine. So a file is looked at
before it is opened: it is a regular one, and it really lies in the tree that was given, or among the blobs of the Hub
cache that the tree lies in. What is opened is what was looked at, whatever becomes of its name meanwhile.
"""

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

from relex.errors import CheckpointMismatchError, UnreachableError
from relex.files.directory import FileIdentity, Kind, check_whole

P = ParamSpec("P")
Read = TypeVar("Read")

# What a file system on a network, or a disk that is failing, says of a moment; a handle gone stale is opened anew.
PASSING = frozenset(
    {
        errno.EIO,
        errno.EREMOTEIO,
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ESHUTDOWN,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EMFILE,
        errno.ENFILE,
    }
)
# Before each further try, in seconds.
_PAUSES = (0.05, 0.2, 0.5)
_DESCRIPTORS = "/proc/self/fd"
# As huggingface_hub names them: by the digest that git has, or the content.
_BLOB = "[0-9a-f]{40,64}"
_SHARED_BLOB = "[0-9a-f]{2}/[0-9a-f]{64}"


def _patient(
    look: "Callable[Concatenate[LocalDirectory, P], Read]",
) -> "Callable[Concatenate[LocalDirectory, P], Read]":
    """Try again what failed for the moment; raises UnreachableError when it goes on failing."""

    @wraps(look)
    def tried(self: "LocalDirectory", /, *args: P.args, **kwargs: P.kwargs) -> Read:
        pauses = iter(_PAUSES)
        while True:
            try:
                return look(self, *args, **kwargs)
            except OSError as error:
                if error.errno not in PASSING:
                    raise
                pause = next(pauses, None)
                if pause is None:
                    raise UnreachableError(
                        f"{error.filename or self} cannot be read now ({error.strerror}). Check its file system, then"
                        " run again; a watcher tries again by itself."
                    ) from error
                time.sleep(pause)

    return tried


@dataclass(frozen=True)
class LocalDirectory:
    """A directory of a mounted file system.

    Files that are opened lie in all of `trees`, links resolved; without any, in this directory.
    """

    path: Path
    trees: tuple[Path, ...] = field(default=(), compare=False, repr=False)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def kind(self) -> Kind:
        """Files grow here, in the order they are written."""
        return Kind.DISK

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.path.name

    def exists(self) -> bool:
        """Whether it is a directory."""
        return self.path.is_dir()

    @_patient
    def files(self) -> Mapping[str, FileIdentity]:
        """Return the files directly in it by name."""
        identities = {}
        for entry in self._entries():
            # It may go meanwhile, or be a link to nothing or to itself.
            with _gone():
                if entry.is_file():
                    identities[entry.name] = _identity(entry.name, entry.stat())
        return identities

    @_patient
    def children(self) -> tuple[str, ...]:
        """Return the sorted names of the directories directly in it, and of links that lead in a circle."""
        return tuple(entry.name for entry in self._entries() if _is_directory(entry))

    def enter(self, name: str) -> "LocalDirectory":
        """Return the directory `name` in it, of the same tree."""
        return LocalDirectory(self.path / name, self._trees)

    def checkpoint(self, name: str) -> "LocalDirectory":
        """Return the directory `name` in it as a tree of its own, which lies in this one."""
        return LocalDirectory(self.path / name, (*self._trees, self.path / name))

    @_patient
    def identity(self, name: str) -> FileIdentity:
        """Stat one file, links followed."""
        return _identity(name, (self.path / name).stat())

    @_patient
    def check(self, name: str) -> None:
        """Look at a file that is to be read whole, without opening it."""
        with self._looked_at(name) as place:
            check_whole(self, name, os.fstat(place).st_size)

    @_patient
    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes `start` to `stop` of a file."""
        with self._opened(name) as descriptor, open(descriptor, "rb", closefd=False) as file:
            if stop is None:
                stop = os.fstat(descriptor).st_size
                check_whole(self, name, stop)
            file.seek(start)
            return file.read(max(0, stop - start))

    @_patient
    def read_into(self, name: str, position: int, buffer: memoryview) -> int:
        """Fill `buffer` with `pread`: where a map would kill the process, a file that got shorter ends early."""
        total = 0
        with self._opened(name) as descriptor:
            while total < len(buffer):
                count = os.preadv(descriptor, [buffer[total:]], position + total)
                if count == 0:
                    break
                total += count
        return total

    @_patient
    def descriptor(self, name: str) -> int:
        """Open a file to be read by `pread`, and to be closed by whoever asked."""
        with self._looked_at(name) as place:
            return self._open(place, name)

    @_patient
    def last_change(self) -> float:
        """Return the newest modification time in the tree, of a link its own: what it leads to may change all day."""
        times = [self.path.lstat().st_mtime_ns, _time(Path(os.path.realpath(self.path)))]
        for root, directories, files in os.walk(self.path):
            times += [_time(Path(root, name)) for name in (*directories, *files)]
        return max(times) / 1e9

    @_patient
    def newest_file(self) -> int:
        """Return the newest modification time of the files in the tree, of a link its own."""
        return max((_time(Path(root, name)) for root, _, files in os.walk(self.path) for name in files), default=0)

    @_patient
    def hole(self, file: FileIdentity) -> int | None:
        """Return where a sparse file has its first hole: on a network file system, a part that has not arrived."""
        with self._opened(file.name) as descriptor:
            hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
        return hole if hole < file.size else None

    @property
    def _trees(self) -> tuple[Path, ...]:
        return self.trees or (self.path,)

    @cached_property
    def _inside(self) -> "_Inside":
        return _Inside.of(self._trees)

    def _entries(self) -> list["os.DirEntry[str]"]:
        with os.scandir(self.path) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[int]:
        with self._looked_at(name) as place:
            descriptor = self._open(place, name)
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, place: int, name: str) -> int:
        try:
            return os.open(f"{_DESCRIPTORS}/{place}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path / name)) from None

    @contextlib.contextmanager
    def _looked_at(self, name: str) -> Iterator[int]:
        """Yield the place of a regular file of the tree, not opened; raises CheckpointMismatchError for another."""
        path = self.path / name
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISREG(os.fstat(place).st_mode):
                raise CheckpointMismatchError(
                    f"{path} is no regular file, and nothing else is opened. Delete it, or save the checkpoint again."
                )
            self._check_inside(path, os.readlink(f"{_DESCRIPTORS}/{place}"))  # noqa: PTH115
            yield place
        finally:
            os.close(place)

    def _check_inside(self, path: Path, real: str) -> None:
        if real in self._inside:
            return
        # A directory above may have been given another name since the tree was first looked at, or just now.
        now = _Inside.of(self._trees)
        if real in now:
            return
        if os.path.realpath(path) in now:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        raise CheckpointMismatchError(
            f"{path} is a link to {real}, outside of it. A checkpoint may not point outside itself: copy the file, or"
            " give the directory that holds it."
        )


@dataclass(frozen=True)
class _Inside:
    """The real paths of files that lie in all of some trees, or are blobs of the Hub cache that these lie in."""

    trees: tuple[str, ...]
    blobs: tuple[re.Pattern[str], ...]

    @classmethod
    def of(cls, trees: tuple[Path, ...]) -> "_Inside":
        real = [Path(os.path.realpath(tree)) for tree in trees]
        # CACHE/models--ORG--NAME/snapshots/REVISION/NAME is a link to CACHE/models--ORG--NAME/blobs/DIGEST, and that
        # may be one to what several repositories have in common, CACHE/blobs/DI/DIGEST.
        repositories = [
            parent.parent
            for parent in real[0].parents
            if parent.name == "snapshots" and parent.parent.name.startswith("models--")
        ]
        blobs = [re.compile(rf"{re.escape(str(place))}/blobs/{_BLOB}") for place in repositories]
        blobs += [re.compile(rf"{re.escape(str(place.parent))}/blobs/{_SHARED_BLOB}") for place in repositories]
        return cls(tuple(_below(tree) for tree in real), tuple(blobs))

    def __contains__(self, real: str) -> bool:
        return all(real.startswith(tree) for tree in self.trees) or any(blob.fullmatch(real) for blob in self.blobs)


def _below(directory: Path) -> str:
    return f"{str(directory).rstrip('/')}/"


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            raise


def _is_directory(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # Who enters it is told.
        if error.errno != errno.ELOOP:
            raise
        return True


def _time(path: Path) -> int:
    """Return when what is there changed (ns since the epoch), 0 where nobody can tell."""
    with _gone(), contextlib.suppress(PermissionError):
        return path.lstat().st_mtime_ns
    return 0


def _identity(name: str, stat: os.stat_result) -> FileIdentity:
    return FileIdentity(name, stat.st_size, stat.st_mtime_ns, str(stat.st_ino), stat.st_ctime_ns, stat.st_nlink)
