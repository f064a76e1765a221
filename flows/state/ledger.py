"""What the watcher has announced, and what is due.

`tick` compares the store with the ledger and says which events are due. A full window is announced again, with growing
pauses, until it is claimed: a server delivers events at best effort, and whoever comes second finds the window claimed
or decided.

A run that is resumed at an earlier step starts a new segment, and one window never holds steps of two. A step belongs
to an earlier segment when a lower step was written after it. (Not to be told is an old step that a resumed run passes
without writing it again, as with other save steps: everything about it is as if the run had gone on from there.)
"""

import contextlib
import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from flows.settings import Settings
from flows.state.windows import claimed, decided, window_key, write_json
from relex.files.directory import Directory, Kind
from relex.layouts.weights import Weights
from relex.store import State, StoredCheckpoint

CHECKPOINT_READY = "relex.checkpoint.ready"
WINDOW_READY = "relex.window.ready"

_RESEND_SECONDS = 30.0
_RESEND_SECONDS_AT_MOST = 300.0


@dataclass(frozen=True)
class Event:
    """One event to send; the id is the same whenever the same thing is announced."""

    name: str
    id: UUID
    resource: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Seen:
    """An announced checkpoint: the identity of its files, and when they were written (ns since the epoch)."""

    identity: str
    written: int


@dataclass(frozen=True)
class Sent:
    """How often something was announced, and when last (seconds since the epoch)."""

    times: int
    last: float

    def due(self, now: float) -> bool:
        """Whether it is announced again at time `now`: the pauses grow."""
        wait = min(_RESEND_SECONDS * 2 ** max(self.times - 1, 0), _RESEND_SECONDS_AT_MOST)
        return self.times == 0 or now - self.last >= wait


@dataclass(frozen=True)
class Ledger:
    """Announced checkpoints by step, announced windows by key, and the decided window whose pins were released."""

    checkpoints: dict[str, Seen] = field(default_factory=dict)
    windows: dict[str, Sent] = field(default_factory=dict)
    released: dict[str, Seen] = field(default_factory=dict)


def resource(settings: Settings) -> str:
    """Return the Prefect resource of a training run."""
    return f"relex.training-run.{settings.training_run}"


def tick(
    settings: Settings,
    base: Weights,
    stored: tuple[StoredCheckpoint, ...],
    ledger: Ledger,
    *,
    now: float,
    end: int | None,
) -> tuple[list[Event], Ledger]:
    """Return the events that are due at time `now`, and the ledger as it is once they are sent.

    `end` is the last step of the window that is to be decided, if one is (see arming).
    """
    checkpoints = known(stored, ledger, now=now)
    events = [
        event(
            CHECKPOINT_READY,
            settings,
            f"{item.step} {item.weights.identity}",
            {"training_run": settings.training_run, "step": item.step, "path": str(item.directory)},
        )
        for item in stored
        if item.weights is not None and ledger.checkpoints.get(str(item.step)) != checkpoints[str(item.step)]
    ]
    # What another run or segment left in the ledger is forgotten; what this one has lost is not.
    gone = set(lost(settings, stored, ledger)) - left_behind(stored, checkpoints)
    windows = dict(ledger.windows)
    steps = [] if end is None else due(segment(stored, checkpoints), end)
    if steps and not gone:
        key = window_key(settings, base, [item for item in stored if item.step in steps])
        sent = windows.get(key, Sent(0, 0.0))
        if sent.due(now) and not decided(settings, key) and not claimed(settings, key):
            windows[key] = Sent(sent.times + 1, now)
            payload = {"training_run": settings.training_run, "key": key, "steps": steps, "attempt": sent.times + 1}
            # The attempt is part of the id: a server ignores an id it has seen.
            events.append(event(WINDOW_READY, settings, f"{key} {sent.times + 1}", payload))
    there = {item.step for item in stored}
    checkpoints = {step: seen for step, seen in checkpoints.items() if int(step) in there | gone}
    return events, replace(ledger, checkpoints=checkpoints, windows=windows)


def due(stored: Collection[StoredCheckpoint], end: int) -> list[int]:
    """Return the steps of the window up to `end` once it is full, else nothing; `stored` is one segment.

    Full: a ready checkpoint at or after the window's end, at least two up to it, and none up to it that is not ready.
    """
    inside = [item for item in stored if item.step <= end]
    reached = any(item.step >= end and item.state is State.READY for item in stored)
    if not reached or len(inside) < 2 or any(item.state is not State.READY for item in inside):
        return []
    return [item.step for item in inside]


def known(stored: Collection[StoredCheckpoint], ledger: Ledger, *, now: float) -> dict[str, Seen]:
    """Return the checkpoints of the ledger and, over them, those that are ready at time `now`.

    On a disk the files say when they were written; elsewhere it is when they were first seen.
    """
    found = dict(ledger.checkpoints)
    latest = max((seen.written for seen in found.values()), default=0)
    for item in stored:
        before = found.get(str(item.step))
        if item.weights is None or (before is not None and before.identity == item.weights.identity):
            continue
        written = _written(item, default=int(now * 1e9))
        if before is not None and before.written != written:
            # What was seen to change is newer than all that was there before, whatever its clock says.
            written = max(written, latest + 1)
        found[str(item.step)] = Seen(item.weights.identity, written)
    return found


def left_behind(stored: Collection[StoredCheckpoint], checkpoints: Mapping[str, Seen]) -> set[int]:
    """Return the steps that a resumed run left behind: a lower step was written after them.

    `checkpoints` are those that are known. One that is not ready counts as well, on a disk: by the newest of its files
    for the steps after it, and by any change to it for itself, since first files may be copies with times of their own.
    """
    written = {int(step): (seen.written, seen.written) for step, seen in checkpoints.items()}
    for item in stored:
        if item.weights is None and item.directory.kind is Kind.DISK:
            with contextlib.suppress(FileNotFoundError):
                files = max(_times(item.directory), default=0)
                written[item.step] = (files, max(files, int(item.directory.last_change() * 1e9)))
    behind, newest = set(), 0
    for step, (files, changed) in sorted(written.items()):
        if changed < newest:
            behind.add(step)
        newest = max(newest, files)
    return behind


def segment(stored: Collection[StoredCheckpoint], checkpoints: Mapping[str, Seen]) -> tuple[StoredCheckpoint, ...]:
    """Return what belongs to the newest segment of the run."""
    behind = left_behind(stored, checkpoints)
    return tuple(item for item in stored if item.step not in behind)


def lost(settings: Settings, stored: Collection[StoredCheckpoint], ledger: Ledger) -> list[int]:
    """Return the steps of the window that were announced and have been removed while the run went on.

    They were pruned by the trainer: the window would silently be another one. A run that was started anew in the same
    directory has none of the announced files and loses nothing.
    """
    there = {item.step for item in stored}
    kept = []
    for item in stored:
        seen = ledger.checkpoints.get(str(item.step))
        # A copy of what was announced was written when that was.
        same = seen is not None and item.weights is not None and item.weights.identity == seen.identity
        if same or (seen is not None and _written(item, default=-1) == seen.written):
            kept.append(item.step)
    announced = [int(step) for step in ledger.checkpoints if int(step) <= settings.end]
    return sorted(step for step in announced if step not in there and step < max(kept, default=0))


def read_ledger(settings: Settings) -> Ledger:
    """Read the ledger; an absent one is empty."""
    path = settings.home / "ledger.json"
    if not path.is_file():
        return Ledger()
    content = json.loads(path.read_bytes())
    checkpoints, released = (
        {step: Seen(**seen) for step, seen in content[name].items()} for name in ("checkpoints", "released")
    )
    windows = {key: Sent(**sent) for key, sent in content["windows"].items()}
    return Ledger(checkpoints, windows, released)


def write_ledger(settings: Settings, ledger: Ledger) -> None:
    """Replace the ledger in one piece."""
    write_json(settings.home / "ledger.json", asdict(ledger))


def _written(item: StoredCheckpoint, *, default: int) -> int:
    if item.weights is None or item.directory.kind is not Kind.DISK:
        return default
    return max(file.mtime_ns for file in item.weights.files)


def _times(directory: Directory) -> list[int]:
    inner = [time for name in directory.children() for time in _times(directory.enter(name))]
    return [file.mtime_ns for file in directory.files().values()] + inner


def event(name: str, settings: Settings, what: str, payload: dict[str, Any]) -> Event:
    """Return the event that tells `what`; its id is the same whenever that is told."""
    where = resource(settings)
    return Event(name, uuid5(NAMESPACE_URL, f"{where} {settings.home} {name} {what}"), where, payload)
