"""A directory of a mounted file system."""

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from relex.files.directory import FileIdentity, Kind


@dataclass(frozen=True)
class LocalDirectory:
    """A directory of a mounted file system."""

    path: Path

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

    def files(self) -> Mapping[str, FileIdentity]:
        """Return the files directly in it by name."""
        identities = {}
        for entry in sorted(os.scandir(self.path), key=lambda entry: entry.name):
            # It may go meanwhile, or be a link to nothing.
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    identities[entry.name] = _identity(entry.name, entry.stat())
        return identities

    def children(self) -> tuple[str, ...]:
        """Return the sorted names of the directories directly in it."""
        return tuple(sorted(entry.name for entry in os.scandir(self.path) if entry.is_dir()))

    def enter(self, name: str) -> "LocalDirectory":
        """Return the directory `name` in it."""
        return LocalDirectory(self.path / name)

    def identity(self, name: str) -> FileIdentity:
        """Stat one file, links followed."""
        return _identity(name, (self.path / name).stat())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Return bytes `start` to `stop` of a file."""
        with (self.path / name).open("rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)

    def read_into(self, name: str, position: int, buffer: memoryview) -> int:
        """Fill `buffer` with `pread`: where a map would kill the process, a file that got shorter ends early."""
        total = 0
        descriptor = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while total < len(buffer):
                count = os.preadv(descriptor, [buffer[total:]], position + total)
                if count == 0:
                    break
                total += count
        finally:
            os.close(descriptor)
        return total

    def last_change(self) -> float:
        """Return the newest modification time in the tree."""
        times = [self.path.stat().st_mtime]
        for root, directories, files in os.walk(self.path):
            for name in (*directories, *files):
                with contextlib.suppress(FileNotFoundError):
                    times.append((Path(root) / name).stat().st_mtime)
        return max(times)

    def outside(self, file: FileIdentity) -> str | None:
        """Return where a link leads that leads out."""
        target = (self.path / file.name).resolve()
        # The Hub's own cache keeps snapshots/REVISION/NAME as a link to blobs/DIGEST.
        inside = self.path.resolve() in target.parents or target.parent.name == "blobs"
        return None if inside else str(target)

    def hole(self, file: FileIdentity) -> int | None:
        """Return where a sparse file has its first hole: on a network file system, a part that has not arrived."""
        descriptor = os.open(self.path / file.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            hole = os.lseek(descriptor, 0, os.SEEK_HOLE)
        finally:
            os.close(descriptor)
        return hole if hole < file.size else None


def _identity(name: str, stat: os.stat_result) -> FileIdentity:
    return FileIdentity(name, stat.st_size, stat.st_mtime_ns, str(stat.st_ino), stat.st_ctime_ns, stat.st_nlink)
