"""What the watcher has announced of a run, and which of its checkpoints belong to the newest segment.

A run that is resumed at an earlier step starts a new segment, and one window never holds steps of two. A step belongs
to an earlier segment when a lower step was written after it. (Not to be told is an old step that a resumed run passes
without writing it again, as with other save steps: everything about it is as if the run had gone on from there.)
"""

import contextlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from flows.settings import Settings
from flows.state.events import Sent
from flows.state.records import read_json, write_json
from relex.errors import UnreachableError
from relex.files.directory import Kind
from relex.store import StoredCheckpoint


@dataclass(frozen=True)
class Seen:
    """An announced checkpoint: the identity of its files, and when they were written (ns since the epoch)."""

    identity: str
    written: int


@dataclass(frozen=True)
class Ledger:
    """Announced checkpoints by step, announced windows by key, and the decided window whose pins were released."""

    checkpoints: dict[str, Seen] = field(default_factory=dict)
    windows: dict[str, Sent] = field(default_factory=dict)
    released: dict[str, Seen] = field(default_factory=dict)


def known(stored: Collection[StoredCheckpoint], ledger: Ledger, *, now: float) -> dict[str, Seen]:
    """Return the checkpoints of the ledger and, over them, those that are ready at time `now`.

    On a disk the files say when they were written; elsewhere it is when they were first seen.
    """
    checkpoints = dict(ledger.checkpoints)
    latest = max((seen.written for seen in checkpoints.values()), default=0)
    for checkpoint in stored:
        before = checkpoints.get(str(checkpoint.step))
        if checkpoint.weights is None or (before is not None and before.identity == checkpoint.weights.identity):
            continue
        written = written_at(checkpoint, default=int(now * 1e9))
        if before is not None and before.written != written:
            # What was seen to change is newer than all that was there before, whatever its clock says.
            written = max(written, latest + 1)
        checkpoints[str(checkpoint.step)] = Seen(checkpoint.weights.identity, written)
    return checkpoints


def left_behind(stored: Collection[StoredCheckpoint], checkpoints: Mapping[str, Seen]) -> set[int]:
    """Return the steps that a resumed run left behind: a lower step was written after them.

    `checkpoints` are those that are known. One that is not ready counts as well, on a disk: by the newest of its files
    for the steps after it, and by any change to it for itself, since first files may be copies with times of their own.
    """
    written = {int(step): (seen.written, seen.written) for step, seen in checkpoints.items()}
    for checkpoint in stored:
        if checkpoint.weights is None and checkpoint.directory.kind is Kind.DISK:
            # Of what does not answer nobody can tell; it is not ready, and keeps its window waiting.
            with contextlib.suppress(FileNotFoundError, UnreachableError):
                files = checkpoint.directory.newest_file()
                written[checkpoint.step] = (files, max(files, int(checkpoint.directory.last_change() * 1e9)))
    behind, newest = set(), 0
    for step, (files, changed) in sorted(written.items()):
        if changed < newest:
            behind.add(step)
        newest = max(newest, files)
    return behind


def segment(stored: Collection[StoredCheckpoint], checkpoints: Mapping[str, Seen]) -> tuple[StoredCheckpoint, ...]:
    """Return what belongs to the newest segment of the run."""
    behind = left_behind(stored, checkpoints)
    return tuple(checkpoint for checkpoint in stored if checkpoint.step not in behind)


def read_ledger(settings: Settings) -> Ledger:
    """Read the ledger; an absent one is empty."""
    path = settings.home / "ledger.json"
    return read_json(path, Ledger) if path.is_file() else Ledger()


def write_ledger(settings: Settings, ledger: Ledger) -> None:
    """Replace the ledger in one piece."""
    write_json(settings.home / "ledger.json", asdict(ledger))


def written_at(checkpoint: StoredCheckpoint, *, default: int) -> int:
    """Return when the files of a ready checkpoint on a disk were written (ns since the epoch), elsewhere `default`."""
    if checkpoint.weights is None or checkpoint.directory.kind is not Kind.DISK:
        return default
    return max(file.mtime_ns for file in checkpoint.weights.files)
