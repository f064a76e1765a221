"""The checkpoints of the window, kept in our own directory from a trainer that deletes them.

The pins are a tree like the trainer's, so that it is read and judged like the trainer's. Files are pinned as soon as
they appear, since a step may live for one training step only; whether a checkpoint is complete is judged on what was
pinned. A step that is written again takes its old pins with it. Left out is what a trainer keeps to resume and no
layout reads: optimizer, schedule, random states, critic.
"""

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
from relex.files.local import LocalDirectory
from relex.layouts.settled import TRACKER
from relex.layouts.steps import step_directories
from relex.store import State, StoredCheckpoint

# How often the trainer's directory is looked at for something new.
REFRESH_SECONDS = 0.1
# Times are as coarse as the file system's clock: what changed so lately may be changing.
_RACY_SECONDS = 2.0
_LEFT_OUT = re.compile(
    r"optim.*|.*_optim_states\.pt|scheduler\.pt|scaler\.pt|rng_state.*|extra_state.*|critic|data\.pt|dataloader.*"
    r"|\.tmp.*|.*\.tmp"
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
        self._active = not released

    @contextmanager
    def kept_fresh(self) -> Iterator[None]:
        """Pin what is new every REFRESH_SECONDS while the block runs."""
        stop = threading.Event()

        def work() -> None:
            while not stop.wait(REFRESH_SECONDS):
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

    def release(self) -> None:
        """Delete all pins, and make none until the next `refresh`."""
        with self._lock:
            self._active = False
            if self._root.exists():
                shutil.rmtree(self._root)

    def drop(self, steps: Collection[int]) -> None:
        """Delete the pins of those of the steps that the trainer has deleted."""
        with self._lock:
            for step, name in _steps(self._root).items():
                if step in steps and not _tree(self._live / name)[0]:
                    shutil.rmtree(self._root / name)

    def vanished(self, stored: Collection[StoredCheckpoint]) -> list[int]:
        """Return the steps that were deleted by the trainer before they were whole here."""
        pinned = _steps(self._root)
        return [
            saved.step
            for saved in stored
            if saved.state is State.BROKEN
            and saved.step in pinned
            and not _tree(self._root / pinned[saved.step])[0].keys() <= _tree(self._live / pinned[saved.step])[0].keys()
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
            # What the tracker vouches for was there before it was read, and is pinned before it is.
            tracker = _read(self._live / TRACKER)
            live = _steps(self._live)
            last = self._last(live)
            for step, name in live.items():
                if step <= last:
                    self._refresh_step(name)
            if tracker is not None and tracker != _read(self._root / TRACKER):
                self._write_tracker(*tracker)

    def _refresh_step(self, name: str) -> None:
        looked = self._looked.get(name)
        if looked is not None and looked == _looks(looked):
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
            if not self._pin(self._live / name / place, self._root / name / place):
                return False
        return True

    def _same(self, live: os.stat_result, pinned: os.stat_result) -> bool:
        if self._mode == "link":
            return live.st_ino == pinned.st_ino
        return (live.st_size, live.st_mtime_ns) == (pinned.st_size, pinned.st_mtime_ns)

    def _pin(self, source: Path, target: Path) -> bool:
        """Pin one file; False when it may still change, and nothing that was written after it may be pinned yet."""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if self._mode == "copy":
                return self._copy(source, target)
            os.link(source, target, follow_symlinks=False)
        except FileNotFoundError:
            # The trainer was quicker.
            return True
        except OSError as error:
            way_out = (
                f"Set pin: copy, or state: to a directory on the file system of {self._live}."
                if self._mode == "link"
                else "Make room, or let the trainer keep the window's checkpoints."
            )
            raise PinError(
                f"{source} cannot be pinned as {target} ({self._mode}: {error.strerror}). {way_out}"
            ) from error
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
        shutil.copy2(source, half, follow_symlinks=False)
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


def _steps(root: Path) -> dict[int, str]:
    if not root.is_dir():
        return {}
    return {step: directory.name for step, directory in step_directories(LocalDirectory(root)).items()}


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
    found = {}
    for directory in directories:
        with suppress(FileNotFoundError, NotADirectoryError):
            status = directory.stat()
            found[directory] = (status.st_ino, status.st_mtime_ns)
    return found


def _size(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_size, status.st_mtime_ns


def _read(path: Path) -> tuple[bytes, int] | None:
    try:
        with path.open("rb") as file:
            return file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
