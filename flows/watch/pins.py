"""The checkpoints of the window, kept in our own directory from a trainer that deletes them.

The pins are a tree like the trainer's, so that it is read and judged like the trainer's. Files are pinned as soon as
they appear, since a step may live for one training step only; whether a checkpoint is complete is judged on what was
pinned. A step that is written again takes its old pins with it. Left out is what a trainer keeps to resume and no
layout reads: optimizer, schedule, random states, critic.
"""

import errno
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from flows.errors import PinError
from flows.settings import Settings
from relex.errors import CheckpointError, UnreachableError
from relex.files.local import LocalDirectory
from relex.files.whole import FULL
from relex.layouts.settled import TRACKER
from relex.layouts.steps import step_names
from relex.store import State, StoredCheckpoint

# How often the trainer's directory is looked at for something new.
REFRESH_SECONDS = 0.1
# Times are as coarse as the file system's clock: what changed so lately may be changing.
_RACY_SECONDS = 2.0
# What no other try changes, and no other checkpoint escapes.
_IMPOSSIBLE = frozenset({errno.EXDEV, errno.EROFS, errno.ENOSYS, errno.EOPNOTSUPP})
# More than any number of steps has.
_MOST_TRACKER_BYTES = 64
_LEFT_OUT = re.compile(
    r"optim.*|.*_optim_states\.pt|scheduler\.pt|scaler\.pt|rng_state.*|extra_state.*|critic|data\.pt|dataloader.*"
    r"|\.tmp.*|.*\.tmp|tmp-rank\d+.*"
)


class Pins:
    """The pins of one training run; one process at a time refreshes them."""

    def __init__(self, settings: Settings, *, released: bool = False) -> None:
        self._live = Path(settings.checkpoints)
        self._root = settings.pins
        self._window = settings.end
        self._mode = settings.pin
        self._lock = threading.Lock()
        # By step directory: its directories with inode and time, when it was last looked at.
        self._looked: dict[str, dict[Path, tuple[int, int]]] = {}
        # Size and time of files that are still to be copied.
        self._growing: dict[Path, tuple[int, int]] = {}
        # By step directory: why it is not pinned yet.
        self._troubles: dict[str, str] = {}
        # Why nothing more can be pinned anywhere, when it was last tried: there is no room.
        self._no_room: OSError | None = None
        self._active = not released

    @contextmanager
    def kept_fresh(self) -> Iterator[None]:
        """Pin what is new every REFRESH_SECONDS while the block runs."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(REFRESH_SECONDS):
                # Who refreshes from outside is told; here the next try comes soon.
                with suppress(OSError, UnreachableError):
                    self._refresh()

        with ThreadPoolExecutor(1, "pins") as pool:
            worker = pool.submit(work)
            try:
                yield
            finally:
                stop.set()
            worker.result()

    def refresh(self) -> None:
        """Pin what is new, now; raises PinError where that is impossible."""
        self._active = True
        if self._mode == "copy":
            # A file may be written again in place, which its directory does not show. A link shows it by itself.
            self._looked.clear()
        self._refresh()

    @property
    def troubles(self) -> dict[str, str]:
        """A line for each step directory that could not be pinned when it was last tried, by its name."""
        with self._lock:
            return dict(self._troubles)

    @property
    def no_room(self) -> OSError | None:
        """What a full disk said when there was last something to pin; None where there was room."""
        with self._lock:
            return self._no_room

    def release(self) -> None:
        """Delete all pins, and make none until the next `refresh`."""
        with self._lock:
            self._active = False
            if self._root.exists():
                shutil.rmtree(self._root)

    def drop(self, steps: Collection[int]) -> None:
        """Delete the pins of those of the steps that the trainer has deleted."""
        with self._lock:
            for step, names in _steps(self._root).items():
                for name in names:
                    if step in steps and not _tree(self._live / name)[0]:
                        shutil.rmtree(self._root / name)

    def vanished(self, stored: Collection[StoredCheckpoint]) -> list[int]:
        """Return the steps that were deleted by the trainer before they were whole here."""
        pinned = _steps(self._root)
        return [
            saved.step
            for saved in stored
            if saved.state is State.BROKEN
            and any(
                not _tree(self._root / name)[0].keys() <= _tree(self._live / name)[0].keys()
                for name in pinned.get(saved.step, ())
            )
        ]

    def end(self) -> int:
        """Return the last step that is read from the pins: the first at or after the window's end."""
        return self._last(_steps(self._live))

    def _last(self, live: Collection[int]) -> int:
        steps = {*live, *_steps(self._root)}
        return min((step for step in steps if step >= self._window), default=self._window)

    def _refresh(self) -> None:
        with self._lock:
            if not self._active or not self._live.is_dir():
                return
            self._no_room = None
            # What the tracker vouches for was there before it was read, and is pinned before it is.
            tracker = _read(self._live)
            live = _steps(self._live)
            last = self._last(live)
            self._troubles = {name: line for name, line in self._troubles.items() if name in _all(live)}
            self._keep_doubled(live)
            for step, names in live.items():
                for name in names if step <= last else ():
                    self._try_step(name)
            if tracker is not None and tracker != _read(self._root):
                self._write_tracker(*tracker)

    def _keep_doubled(self, live: dict[int, tuple[str, ...]]) -> None:
        """Have the pins of a step in as many directories as the trainer has: one of two may be empty, or be deleted."""
        pinned = _steps(self._root)
        for step, names in live.items():
            if len(names) > 1:
                for name in names:
                    (self._root / name).mkdir(parents=True, exist_ok=True)
            for name in set(pinned.get(step, ())) - set(names):
                shutil.rmtree(self._root / name)

    def _try_step(self, name: str) -> None:
        """Pin what is new of one step; what is wrong with it concerns no other, and is tried again."""
        try:
            self._refresh_step(name)
        except UnreachableError as error:
            self._troubles[name] = str(error)
        except OSError as error:
            self._no_room = error if error.errno in FULL else self._no_room
            self._troubles[name] = (
                f"{error.filename or self._live / name} cannot be pinned ({error.strerror}). It is tried again; let it"
                " be read, or delete it."
            )

    def _refresh_step(self, name: str) -> None:
        looked = self._looked.get(name)
        if looked is not None and looked == _looks(looked):
            return
        self._troubles.pop(name, None)
        # What is pinned is no link any more, and would be read.
        if not os.path.realpath(self._live / name).startswith(f"{os.path.realpath(self._live)}/"):
            self._troubles[name] = f"{self._live / name} is a link out of the run and is not pinned. Copy it there."
            return
        files, directories = _tree(self._live / name)
        pinned, _ = _tree(self._root / name)
        changed = {place for place in files.keys() & pinned.keys() if not self._same(files[place], pinned[place])}
        if changed:
            # It is written again: no old file stays beside a new one.
            for place in changed | (pinned.keys() - files.keys()):
                (self._root / name / place).unlink()
                del pinned[place]
        complete = self._pin_files(name, {place: files[place] for place in files.keys() - pinned.keys()})
        for directory, (_, time_ns) in directories.items():
            target = self._root / name / directory.relative_to(self._live / name)
            if target.is_dir():
                # Not when it was pinned: an unfinished checkpoint is as old as it is.
                os.utime(target, ns=(time_ns, time_ns))
        newest = max((time_ns for _, time_ns in directories.values()), default=0)
        if complete and time.time() - newest / 1e9 > _RACY_SECONDS:
            self._looked[name] = directories

    def _pin_files(self, name: str, files: dict[str, os.stat_result]) -> bool:
        # A marker is written last, and pinned last.
        for place in sorted(files, key=lambda place: (files[place].st_mtime_ns, place)):
            source, target = self._live / name / place, self._root / name / place
            try:
                if not self._pin(source, target):
                    return False
            except FileNotFoundError:
                # The trainer was quicker.
                continue
            except OSError as error:
                line = f"{source} cannot be pinned as {target} ({self._mode}: {error.strerror}). {self._way_out}"
                if error.errno in _IMPOSSIBLE:
                    raise PinError(line) from error
                self._no_room = error if error.errno in FULL else self._no_room
                self._troubles[name] = line
                return False
        return True

    @property
    def _way_out(self) -> str:
        if self._mode == "link":
            return f"Set pin: copy, or state: to a directory on the file system of {self._live}."
        return "Let it be read, or let the trainer keep the window's checkpoints."

    def _same(self, live: os.stat_result, pinned: os.stat_result) -> bool:
        if self._mode == "link":
            return live.st_ino == pinned.st_ino
        return (live.st_size, live.st_mtime_ns) == (pinned.st_size, pinned.st_mtime_ns)

    def _pin(self, source: Path, target: Path) -> bool:
        """Pin one file; False when it may still change, and nothing that was written after it may be pinned yet."""
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._mode == "copy":
            return self._copy(source, target)
        os.link(source, target, follow_symlinks=False)
        return True

    def _copy(self, source: Path, target: Path) -> bool:
        before = _size(source)
        directory = LocalDirectory(source.parent)
        if not source.is_symlink():
            lately = time.time() - before[1] / 1e9 < _RACY_SECONDS
            if lately and self._growing.get(source) != before:
                self._growing[source] = before
                return False
            # A hole is a part that has not arrived: in a copy it would be zeros.
            if directory.hole(directory.identity(source.name)) is not None:
                return False
        half = target.with_name(f".tmp-{target.name}")
        half.unlink(missing_ok=True)
        try:
            shutil.copy2(source, half, follow_symlinks=False)
        except OSError:
            half.unlink(missing_ok=True)
            raise
        if _size(source) != before:
            return False
        half.replace(target)
        self._growing.pop(source, None)
        return True

    def _write_tracker(self, content: bytes, time_ns: int) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        half = self._root / f".tmp-{TRACKER}"
        half.write_bytes(content)
        os.utime(half, ns=(time_ns, time_ns))
        half.replace(self._root / TRACKER)


def _steps(root: Path) -> dict[int, tuple[str, ...]]:
    return step_names(LocalDirectory(root)) if root.is_dir() else {}


def _all(steps: dict[int, tuple[str, ...]]) -> set[str]:
    return {name for names in steps.values() for name in names}


def _tree(root: Path) -> tuple[dict[str, os.stat_result], dict[Path, tuple[int, int]]]:
    """Return the files worth pinning below `root` by relative path, and every directory with its inode and time."""
    files: dict[str, os.stat_result] = {}
    directories: dict[Path, tuple[int, int]] = {}
    pending = [root]
    while pending:
        directory = pending.pop()
        # What the trainer removes meanwhile is not there.
        with suppress(FileNotFoundError, NotADirectoryError):
            directories |= _looks([directory])
            for entry in os.scandir(directory):
                if _LEFT_OUT.fullmatch(entry.name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
                    continue
                with suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    # A link is pinned as the link it is, and judged where it is read.
                    if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                        files[os.path.relpath(entry.path, root)] = status
    return files, directories


def _looks(directories: Collection[Path]) -> dict[Path, tuple[int, int]]:
    states = {}
    for directory in directories:
        with suppress(FileNotFoundError, NotADirectoryError):
            status = directory.stat()
            states[directory] = (status.st_ino, status.st_mtime_ns)
    return states


def _size(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_size, status.st_mtime_ns


def _read(root: Path) -> tuple[bytes, int] | None:
    """Return the tracker of a run and when it was written, None without one."""
    directory = LocalDirectory(root)
    try:
        if TRACKER not in directory.files():
            return None
        return directory.read(TRACKER, 0, _MOST_TRACKER_BYTES), directory.identity(TRACKER).mtime_ns
    except (FileNotFoundError, CheckpointError):
        return None
