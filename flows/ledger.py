"""What the watcher has announced, and which windows are claimed and decided: small files in the training run's state
directory.

A window is one decision: its key is a digest of everything that decides it. `tick` compares the store with the ledger
and says which events are due. Events are re-sent with back-off until the window is claimed, since a server delivers
them at best effort; a repeat has the same id, and whoever comes second finds the window claimed or decided.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from filelock import FileLock, Timeout

from flows.decision import Decision
from flows.settings import Settings
from relex.gram import identity
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
class Sent:
    """How often a window was announced, and when last (seconds since the epoch)."""

    times: int
    last: float


@dataclass(frozen=True)
class Ledger:
    """Announced checkpoints (step → identity) and windows (key → Sent)."""

    checkpoints: dict[str, str] = field(default_factory=dict)
    windows: dict[str, Sent] = field(default_factory=dict)


def resource(settings: Settings) -> str:
    """Return the Prefect resource of a training run."""
    return f"relex.training-run.{settings.training_run}"


def tick(
    settings: Settings, base: Weights, stored: tuple[StoredCheckpoint, ...], ledger: Ledger, *, now: float
) -> tuple[list[Event], Ledger]:
    """Return the events that are due at time `now`, and the ledger as it is once they are sent."""
    events = []
    # What another run in the same directory left in the ledger is forgotten; what this one has lost is not.
    gone = set(lost(settings, stored, ledger))
    there = {item.step for item in stored}
    checkpoints = {step: seen for step, seen in ledger.checkpoints.items() if int(step) in there | gone}
    for item in stored:
        if item.weights is None or checkpoints.get(str(item.step)) == identity(item.weights):
            continue
        checkpoints[str(item.step)] = identity(item.weights)
        payload = {"training_run": settings.training_run, "step": item.step, "path": str(item.path)}
        events.append(_event(CHECKPOINT_READY, settings, f"{item.step} {identity(item.weights)}", payload))
    windows = dict(ledger.windows)
    steps = due(settings, stored)
    if steps and not gone:
        key = window_key(settings, base, [item for item in stored if item.step in steps])
        sent = windows.get(key, Sent(0, 0.0))
        wait = min(_RESEND_SECONDS * 2 ** max(sent.times - 1, 0), _RESEND_SECONDS_AT_MOST)
        waiting = sent.times > 0 and now - sent.last < wait
        if not waiting and not decided(settings, key) and not claimed(settings, key):
            windows[key] = Sent(sent.times + 1, now)
            payload = {"training_run": settings.training_run, "key": key, "steps": steps, "attempt": sent.times + 1}
            # The attempt is part of the id: a server ignores an id it has seen.
            events.append(_event(WINDOW_READY, settings, f"{key} {sent.times + 1}", payload))
    return events, replace(ledger, checkpoints=checkpoints, windows=windows)


def due(settings: Settings, stored: tuple[StoredCheckpoint, ...]) -> list[int]:
    """Return the steps of the window once it is full, else nothing.

    Full: a ready checkpoint at or after the window's end, at least two up to it, and none up to it that is not ready.
    """
    inside = [item for item in stored if item.step <= settings.window]
    reached = any(item.step >= settings.window and item.state is State.READY for item in stored)
    if not reached or len(inside) < 2 or any(item.state is not State.READY for item in inside):
        return []
    return [item.step for item in inside]


def lost(settings: Settings, stored: tuple[StoredCheckpoint, ...], ledger: Ledger) -> list[int]:
    """Return the steps of the window that were announced and have been removed while the run went on.

    They were pruned by the trainer: the window would silently be another one. A run that was started anew in the same
    directory has none of the announced files and loses nothing.
    """
    there = {item.step for item in stored}
    kept = [
        item.step
        for item in stored
        if item.weights is not None and ledger.checkpoints.get(str(item.step)) == identity(item.weights)
    ]
    announced = [int(step) for step in ledger.checkpoints if int(step) <= settings.window]
    return sorted(step for step in announced if step not in there and step < max(kept, default=0))


def window_key(settings: Settings, base: Weights, inside: list[StoredCheckpoint]) -> str:
    """Return the name of one decision: a digest of the observed files and of every setting that decides."""
    deciding = ("training_run", "window", "targets", "methods", "selection", "gate", "report", "margin", "confidence")
    content = {name: getattr(settings, name) for name in (*deciding, "registered_model", "dtype", "batch_size")}
    content["base"] = identity(base)
    content["checkpoints"] = [[item.step, identity(item.weights)] for item in inside if item.weights is not None]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def window_directory(settings: Settings, key: str) -> Path:
    """Return the directory of one decision."""
    return settings.home / "windows" / key


def decision_path(settings: Settings, key: str) -> Path:
    """Return the file that is there, complete, once the decision is made; it is written last."""
    return window_directory(settings, key) / "decision.json"


def decided(settings: Settings, key: str) -> bool:
    """Whether the decision is made."""
    return decision_path(settings, key).is_file()


def read_decisions(settings: Settings) -> list[Decision]:
    """Return the decisions made so far, oldest first."""
    paths = sorted(settings.home.glob("windows/*/decision.json"), key=lambda path: path.stat().st_mtime)
    return [Decision.from_json(json.loads(path.read_bytes())) for path in paths]


@contextmanager
def claim(settings: Settings, key: str) -> Iterator[bool]:
    """Hold the window while working on it; yields False when another process does.

    A lock of the operating system, not a file with a date in it: it goes with its process, however that ends.
    """
    directory = window_directory(settings, key)
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / "claim.lock")
    try:
        # Longer than the moment in which the watcher tries the lock.
        lock.acquire(timeout=2.0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def claimed(settings: Settings, key: str) -> bool:
    """Whether a live process holds the window."""
    path = window_directory(settings, key) / "claim.lock"
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return True
    lock.release()
    return False


def read_ledger(settings: Settings) -> Ledger:
    """Read the ledger; an absent one is empty."""
    path = settings.home / "ledger.json"
    if not path.is_file():
        return Ledger()
    content = json.loads(path.read_bytes())
    windows = {key: Sent(**sent) for key, sent in content["windows"].items()}
    return Ledger(content["checkpoints"], windows)


def write_ledger(settings: Settings, ledger: Ledger) -> None:
    """Replace the ledger in one piece."""
    write_json(settings.home / "ledger.json", asdict(ledger))


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is complete or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    with hidden.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)


def _event(name: str, settings: Settings, what: str, payload: dict[str, Any]) -> Event:
    where = resource(settings)
    return Event(name, uuid5(NAMESPACE_URL, f"{where} {settings.home} {name} {what}"), where, payload)
