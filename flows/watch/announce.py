"""What is to be announced of a run: checkpoints that are ready, and the window that is due, until it is decided.

`tick` compares the store with the ledger and says which events are due. A full window is announced again, with growing
pauses, until it is claimed: a server delivers events at best effort, and whoever comes second finds the window claimed
or decided.
"""

from collections.abc import Collection
from dataclasses import replace

from flows.settings import Settings
from flows.state.events import CHECKPOINT_READY, WINDOW_READY, Event, Sent, event
from flows.state.ledger import Ledger, written_at
from flows.state.snapshot import Snapshot
from flows.state.windows import claimed, decided, window_key
from relex.store import State, StoredCheckpoint


def tick(settings: Settings, run: Snapshot, *, end: int | None) -> tuple[list[Event], Ledger]:
    """Return the events that are due at that time, and the ledger as it is once they are sent.

    `end` is the last step of the window that is to be decided, if one is (see flows.watch.due).
    """
    stored, ledger, checkpoints = run.stored, run.ledger, run.known
    events = [
        event(
            CHECKPOINT_READY,
            settings,
            f"{checkpoint.step} {checkpoint.weights.identity}",
            {"training_run": settings.training_run, "step": checkpoint.step, "path": str(checkpoint.directory)},
        )
        for checkpoint in stored
        if checkpoint.weights is not None
        and ledger.checkpoints.get(str(checkpoint.step)) != checkpoints[str(checkpoint.step)]
    ]
    # What another run or segment left in the ledger is forgotten; what this one has lost is not.
    gone = set(lost(settings, stored, ledger)) - run.left_behind
    windows = dict(ledger.windows)
    steps = [] if end is None else full_window(run.newest, end)
    if steps and not gone:
        key = window_key(settings, run.base, [checkpoint for checkpoint in stored if checkpoint.step in steps])
        sent = windows.get(key, Sent(0, 0.0))
        if sent.due(run.now) and not decided(settings, key) and not claimed(settings, key):
            windows[key] = Sent(sent.times + 1, run.now)
            payload = {"training_run": settings.training_run, "key": key, "steps": steps, "attempt": sent.times + 1}
            # The attempt is part of the id: a server ignores an id it has seen.
            events.append(event(WINDOW_READY, settings, f"{key} {sent.times + 1}", payload))
    there = {checkpoint.step for checkpoint in stored}
    checkpoints = {step: seen for step, seen in checkpoints.items() if int(step) in there | gone}
    return events, replace(ledger, checkpoints=checkpoints, windows=windows)


def full_window(stored: Collection[StoredCheckpoint], end: int) -> list[int]:
    """Return the steps of the window up to `end` once it is full, else nothing; `stored` is one segment.

    Full: a ready checkpoint at or after the window's end, at least two up to it, and none up to it that is not ready.
    """
    inside = [checkpoint for checkpoint in stored if checkpoint.step <= end]
    reached = any(checkpoint.step >= end and checkpoint.state is State.READY for checkpoint in stored)
    if not reached or len(inside) < 2 or any(checkpoint.state is not State.READY for checkpoint in inside):
        return []
    return [checkpoint.step for checkpoint in inside]


def lost(settings: Settings, stored: Collection[StoredCheckpoint], ledger: Ledger) -> list[int]:
    """Return the steps of the window that were announced and have been removed while the run went on.

    They were pruned by the trainer: the window would silently be another one. A run that was started anew in the same
    directory has none of the announced files and loses nothing.
    """
    there = {checkpoint.step for checkpoint in stored}
    kept = []
    for checkpoint in stored:
        seen = ledger.checkpoints.get(str(checkpoint.step))
        # A copy of what was announced was written when that was.
        same = seen is not None and checkpoint.weights is not None and checkpoint.weights.identity == seen.identity
        if same or (seen is not None and written_at(checkpoint, default=-1) == seen.written):
            kept.append(checkpoint.step)
    announced = [int(step) for step in ledger.checkpoints if int(step) <= settings.end]
    return sorted(step for step in announced if step not in there and step < max(kept, default=0))
