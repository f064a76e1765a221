"""What the watcher has announced, and what is due.

`tick` compares the store with the ledger and says which events are due. A full window is announced again, with growing
pauses, until it is claimed: a server delivers events at best effort, and whoever comes second finds the window claimed
or decided.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from flows.settings import Settings
from flows.window import claimed, decided, window_key, write_json
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
    """Announced checkpoints (step → identity), those that a resumed run left behind, and windows (key → Sent)."""

    checkpoints: dict[str, str] = field(default_factory=dict)
    stale: list[int] = field(default_factory=list)
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
        if item.weights is None or checkpoints.get(str(item.step)) == item.weights.identity:
            continue
        checkpoints[str(item.step)] = item.weights.identity
        payload = {"training_run": settings.training_run, "step": item.step, "path": str(item.directory)}
        events.append(_event(CHECKPOINT_READY, settings, f"{item.step} {item.weights.identity}", payload))
    behind = stale(stored, ledger)
    windows = dict(ledger.windows)
    steps = due(settings, stored)
    if steps and not gone and not set(steps) & set(behind):
        key = window_key(settings, base, [item for item in stored if item.step in steps])
        sent = windows.get(key, Sent(0, 0.0))
        wait = min(_RESEND_SECONDS * 2 ** max(sent.times - 1, 0), _RESEND_SECONDS_AT_MOST)
        waiting = sent.times > 0 and now - sent.last < wait
        if not waiting and not decided(settings, key) and not claimed(settings, key):
            windows[key] = Sent(sent.times + 1, now)
            payload = {"training_run": settings.training_run, "key": key, "steps": steps, "attempt": sent.times + 1}
            # The attempt is part of the id: a server ignores an id it has seen.
            events.append(_event(WINDOW_READY, settings, f"{key} {sent.times + 1}", payload))
    return events, replace(ledger, checkpoints=checkpoints, stale=behind, windows=windows)


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
        if item.weights is not None and ledger.checkpoints.get(str(item.step)) == item.weights.identity
    ]
    announced = [int(step) for step in ledger.checkpoints if int(step) <= settings.window]
    return sorted(step for step in announced if step not in there and step < max(kept, default=0))


def stale(stored: tuple[StoredCheckpoint, ...], ledger: Ledger) -> list[int]:
    """Return the steps left over from before a resume: announced, unchanged, and after a step that was written again.

    They stay so until they are written again or removed. One trajectory never mixes two segments of a run.
    """
    seen = {item.step: item.weights.identity for item in stored if item.weights is not None}
    known = {int(step): announced for step, announced in ledger.checkpoints.items()}
    rewritten = [step for step, now in seen.items() if step in known and known[step] != now]
    after = min(rewritten, default=None)
    return [
        item.step
        for item in stored
        if item.step in known
        and seen.get(item.step, known[item.step]) == known[item.step]
        and (item.step in ledger.stale or (after is not None and item.step > after))
    ]


def read_ledger(settings: Settings) -> Ledger:
    """Read the ledger; an absent one is empty."""
    path = settings.home / "ledger.json"
    if not path.is_file():
        return Ledger()
    content = json.loads(path.read_bytes())
    windows = {key: Sent(**sent) for key, sent in content["windows"].items()}
    return Ledger(content["checkpoints"], content["stale"], windows)


def write_ledger(settings: Settings, ledger: Ledger) -> None:
    """Replace the ledger in one piece."""
    write_json(settings.home / "ledger.json", asdict(ledger))


def _event(name: str, settings: Settings, what: str, payload: dict[str, Any]) -> Event:
    where = resource(settings)
    return Event(name, uuid5(NAMESPACE_URL, f"{where} {settings.home} {name} {what}"), where, payload)
