"""Targets that the run has reached, announced until what was compared with them is kept and shown."""

from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flows.drift.due import planned_end, reached
from flows.drift.record import is_comparing, read_compared, was_shown
from flows.observed.score import due as observed_due
from flows.settings import Settings
from flows.state.events import TARGET_REACHED, Event, Sent, event
from flows.state.ledger import Ledger, segment
from flows.state.records import read_json, write_json
from relex.store import StoredCheckpoint


def announce(
    settings: Settings, stored: Collection[StoredCheckpoint], ledger: Ledger, *, now: float
) -> tuple[list[Event], dict[str, Sent]]:
    """Return the events that are due at time `now`, one a target step, and what is sent once they are.

    `ledger` knows what the store has. A target is announced with growing pauses until what was compared with it is
    kept and shown, and so is the newest observed checkpoint that is to be scored; not while a process is comparing.
    """
    due: dict[str, dict[str, Any]] = {}
    rows = [prediction.before for prediction in reached(settings, tuple(stored), ledger.released | ledger.checkpoints)]
    rows += [row for row in read_compared(settings) if not was_shown(settings, row)]
    for row in rows:
        name = f"{row.key} {row.target} {row.step}"
        payload = {"training_run": settings.training_run, "key": row.key, "target": row.target, "step": row.step}
        methods = due.setdefault(name, payload | {"methods": []})["methods"]
        methods += [row.method] if row.method not in methods else []
    end = planned_end(settings, tuple(stored), ledger.released | ledger.checkpoints)
    if end is not None:
        payload = {"training_run": settings.training_run, "key": "", "target": end.step, "step": end.step}
        due[f"the planned end {end.step}"] = payload | {"methods": []}
    seen = ledger.released | ledger.checkpoints
    for checkpoint in observed_due(settings, segment(tuple(stored), seen), seen)[:1]:
        payload = {"training_run": settings.training_run, "key": "", "target": checkpoint.step, "step": checkpoint.step}
        due[f"observed {checkpoint.step} {checkpoint.weights.identity}"] = payload | {"methods": []}
    sent = {name: earlier for name, earlier in _read_sent(settings).items() if name in due}
    events = []
    for name, payload in due.items():
        before = sent.get(name, Sent(0, 0.0))
        if not before.due(now) or is_comparing(settings):
            continue
        attempt = before.times + 1
        sent[name] = Sent(attempt, now)
        # The attempt is part of the id: a server ignores an id it has seen.
        events.append(event(TARGET_REACHED, settings, f"{name} {attempt}", payload | {"attempt": attempt}))
    return events, sent


def write_sent(settings: Settings, sent: dict[str, Sent]) -> None:
    """Keep what was sent, so that the next watcher waits as long."""
    if sent != _read_sent(settings):
        write_json(_sent_path(settings), {name: asdict(announced) for name, announced in sent.items()})


def _read_sent(settings: Settings) -> dict[str, Sent]:
    path = _sent_path(settings)
    return read_json(path, dict[str, Sent]) if path.is_file() else {}


def _sent_path(settings: Settings) -> Path:
    return settings.home / "drift" / "sent.json"
