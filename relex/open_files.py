"""The files that a pass reads, kept open: to open one for every read costs more than to read it."""

import os
import resource
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from relex.errors import RelexError
from relex.files.directory import Directory
from relex.files.local import LocalDirectory

# And no more than half of what the process may open: servers and libraries have theirs.
MOST: Final = 512

File = tuple[Directory, str]
# A directory by its identity, which is known at once: to compare two of them takes longer than a read.
_Key = tuple[int, str]


@dataclass
class _Open:
    descriptor: int
    users: int = 0


@dataclass
class OpenFiles:
    """Descriptors by file, shared by the threads of a pass; at most MOST that nobody is reading from stay open."""

    _open: dict[_Key, _Open] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def using(self, files: Iterable[File]) -> Iterator[list[int | None]]:
        """Yield their descriptors, None for one that cannot be opened, or lies elsewhere than on a disk.

        Who has to read such a file does it without one, and is told then why it cannot be. The directories live longer
        than the pass.
        """
        used: list[_Open | None] = []
        try:
            with self._lock:
                for directory, name in files:
                    used.append(self._take(directory, name))
            yield [None if opened is None else opened.descriptor for opened in used]
        finally:
            with self._lock:
                for opened in used:
                    if opened is not None:
                        opened.users -= 1

    def close(self) -> None:
        """Close them all."""
        with self._lock:
            for opened in self._open.values():
                os.close(opened.descriptor)
            self._open.clear()

    def _take(self, directory: Directory, name: str) -> _Open | None:
        if not isinstance(directory, LocalDirectory):
            return None
        opened = self._open.get((id(directory), name))
        if opened is None:
            self._make_room()
            try:
                opened = self._open[id(directory), name] = _Open(directory.descriptor(name))
            except (OSError, RelexError):
                return None
        opened.users += 1
        return opened

    def _make_room(self) -> None:
        idle = [file for file, opened in self._open.items() if opened.users == 0]
        most = min(MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)
        for file in idle[: max(0, len(self._open) + 1 - most)]:
            os.close(self._open.pop(file).descriptor)
