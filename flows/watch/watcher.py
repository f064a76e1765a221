"""The watcher of one training run: looks at the store, announces what is due.

What was announced is in the ledger, so a watcher that is killed and started again announces nothing twice. Where the
window is pinned, a thread of the watcher pins; the next watcher waits until this one ends, so that no step falls
between two.
"""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace

from prefect.events import emit_event

from flows.drift.announce import announce, write_sent
from flows.errors import WatchError
from flows.settings import Settings
from flows.state.events import CHECKPOINT_READY
from flows.state.ledger import Ledger, Seen, left_behind, read_ledger, segment, write_ledger
from flows.state.lock import held
from flows.state.snapshot import Snapshot, absences
from flows.state.windows import decided, key_of
from flows.watch import outbox
from flows.watch.announce import full_window, lost, tick
from flows.watch.due import DueWindow, arm
from flows.watch.notices import Notices
from flows.watch.pins import Pins
from flows.watch.standing import Standing, write_standing
from relex.errors import RelexError
from relex.files.location import open_directory
from relex.files.whole import FULL
from relex.layouts.pruning import setting_of, warning
from relex.layouts.weights import Weights
from relex.sanity import holes
from relex.store import State, StoredCheckpoint, open_base, scan

logger = logging.getLogger(__name__)

# Until the next look after one that failed, at most.
_AGAIN_SECONDS = 5.0

Look = Callable[[float, str], None]
"""Called after every look at the store, with how full the window is in per cent and one line for a reader."""


def watch_store(settings: Settings, *, seconds: float, on_look: Look | None = None, patience: float = 2.0) -> None:
    """Look at the store every `poll_seconds` for `seconds`, and send what is due.

    Raises WatchError when another watcher of this training run is still at work after `patience` seconds, PinError when
    no checkpoint can be pinned where it is to be. A store or base that is not there yet, does not answer or cannot be
    read is waited for, and so are one checkpoint, without the others, and room for the state.
    """
    end = time.monotonic() + seconds
    said = _Said(settings, on_look)
    path = settings.home / "watcher.lock"
    while True:
        try:
            settings.home.mkdir(parents=True, exist_ok=True)
            with held(path, seconds=min(patience, seconds)) as mine:
                if not mine:
                    raise WatchError(
                        f"training run {settings.training_run} is watched by another process (it holds {path})."
                        " Stop that one first."
                    )
                return _watch(settings, said, end)
        except OSError as error:
            # There is no room for the state directory, or for its lock.
            said.waits(error)
        if time.monotonic() + _AGAIN_SECONDS > end:
            return
        time.sleep(_AGAIN_SECONDS)


class _Said:
    """Where the watcher says what it sees: to whoever called it, in the state directory, and once in the log."""

    def __init__(self, settings: Settings, on_look: Look | None) -> None:
        self._settings = settings
        self._on_look = on_look
        self._warned: list[str] = []

    def __call__(self, progress: float, text: str) -> None:
        """Say what was seen."""
        with suppress(OSError):
            # Where there is no room for it, that is what is waited for, and the log says so.
            write_standing(self._settings, Standing(time.time(), progress, text))
        if self._on_look is not None:
            self._on_look(progress, text)

    def warn(self, lines: list[str]) -> None:
        """Log the lines that were not among those of the look before: what comes back is said again."""
        for line in lines:
            if line not in self._warned:
                logger.warning("%s", line)
        self._warned = lines

    def waits(self, error: RelexError | OSError) -> None:
        """Say that a look has failed and is tried again."""
        cause = error if isinstance(error, OSError) else error.__cause__
        line = f"waiting: {error}"
        if isinstance(cause, OSError) and cause.errno in FULL:
            # How many bytes were missing for which file is another line each time.
            line = f"waiting for room in {self._settings.state}: {cause.strerror}"
        self.warn([line])
        self(0.0, f"{self._settings.training_run}: {line}")


def _watch(settings: Settings, said: _Said, end: float) -> None:
    """Look until `end` (monotonic seconds)."""
    pins = None if settings.pin == "none" else Pins(settings, released=bool(read_ledger(settings).released))
    notices = Notices(settings)
    with nullcontext() if pins is None else pins.kept_fresh():
        while True:
            pause = settings.poll_seconds
            try:
                said.warn([*_look(settings, pins, said), *notices.look()])
            except (RelexError, OSError) as error:
                # The network comes back, a repository may be made later, who starts anew moves the run away, and what
                # is wrong with the base or the file system somebody may put right.
                said.waits(error)
                pause = min(pause, _AGAIN_SECONDS)
            if time.monotonic() + pause > end:
                return
            time.sleep(pause)


def _look(settings: Settings, pins: Pins | None, on_look: Look) -> list[str]:
    """Look once; return the lines that the user should be warned with."""
    base_directory, run = open_directory(settings.base), open_directory(settings.checkpoints)
    absent = absences(settings, base_directory, run)
    if absent:
        lines = [f"waiting for {line}" for line in absent]
        on_look(0.0, f"{settings.training_run}: {'; '.join(lines)}")
        return lines
    now = time.time()
    base = open_base(base_directory)
    before = ledger = read_ledger(settings)
    if pins is None:
        stored = scan(run, base, now=now)
    else:
        if ledger.released:
            ledger = _after_release(settings, pins, base, ledger, now=now)
        stored = _pinned(settings, pins, base, now=now, released=bool(ledger.released))
    snapshot = Snapshot(base, ledger, stored, now)
    ours = {step: seen for step, seen in snapshot.ever.items() if int(step) not in snapshot.left_behind}

    def tell(what: str, done: int, total: int) -> None:
        on_look(0.0, f"{settings.training_run}: backtest, {what} {100 * done // max(total, 1)} %")

    due = arm(settings, base, snapshot.newest, ours, tell=tell)
    events, ledger = tick(settings, snapshot, end=due.end)
    asks = settings.drift != "off" or settings.score_every is not None
    drifted, sent = announce(settings, stored, ledger, now=now) if asks else ([], {})
    # A window and a target are announced until somebody works on them; for a checkpoint nobody has to.
    outbox.keep(settings, [event for event in events if event.name == CHECKPOINT_READY], now=now)
    for event in (*events, *drifted, *outbox.due(settings, now=now)):
        emit_event(event.name, {"prefect.resource.id": event.resource}, payload=event.payload, id=event.id)
    if pins is not None:
        ledger = _with_release(due, snapshot.newest, ledger)
    # After sending: what a crash in between repeats has the same id, and is claimed once.
    if ledger != before:
        write_ledger(settings, ledger)
    write_sent(settings, sent)
    for event in (*events, *drifted):
        logger.info("%s %s", event.name, event.payload)
    broken = {checkpoint.directory.name: checkpoint for checkpoint in stored if checkpoint.state is State.BROKEN}
    troubles = {} if pins is None else pins.troubles
    lines = [line for name, line in troubles.items() if name not in broken]
    lines += filter(None, [warning(run, window=settings.end)] if pins is None else [])
    warned = "; ".join(lines)
    gone = pins.vanished(stored) if pins is not None else ()
    progress, text = describe(settings, stored, ledger, due, vanished=gone)
    on_look(progress, f"{text}; {warned}" if warned else text)
    if pins is not None:
        pins.drop(left_behind(stored, ledger.checkpoints))
    return [*lines, *(f"step {checkpoint.step} is broken: {checkpoint.reason}" for checkpoint in broken.values())]


def _pinned(
    settings: Settings, pins: Pins, base: Weights, *, now: float, released: bool
) -> tuple[StoredCheckpoint, ...]:
    """Return the checkpoints of the window as they are pinned (none once released), and the later ones as they are.

    One of the window that is not pinned is not ready: without it, the window would silently be another one.
    """
    if not released:
        pins.refresh()
        if (error := pins.no_room) is not None:
            # What is pinned in part is not broken: it waits for room, and so does everything else.
            raise error
    end = pins.end()
    kept = scan(settings.pins, base, now=now) if settings.pins.exists() else ()
    live = scan(settings.checkpoints, base, now=now)
    steps = {checkpoint.step for checkpoint in kept}
    left = [
        _unpinned(checkpoint)
        for checkpoint in live
        if checkpoint.step <= end and checkpoint.step not in steps and not released
    ]
    inside = sorted((*kept, *left), key=lambda checkpoint: checkpoint.step)
    return (*inside, *(checkpoint for checkpoint in live if checkpoint.step > end))


def _unpinned(checkpoint: StoredCheckpoint) -> StoredCheckpoint:
    if checkpoint.state is not State.READY:
        return checkpoint
    return replace(
        checkpoint, state=State.NOT_YET, reason=f"{checkpoint.directory} is not pinned yet. Wait.", weights=None
    )


def _with_release(due: DueWindow, newest: Sequence[StoredCheckpoint], ledger: Ledger) -> Ledger:
    """Return the ledger that lets the pins go once nothing more will be decided, else the ledger as it is."""
    if not due.closed or due.end is None or ledger.released:
        return ledger
    inside = {str(step): ledger.checkpoints[str(step)] for step in full_window(newest, due.end)}
    if not inside:
        return ledger
    later = {step: seen for step, seen in ledger.checkpoints.items() if int(step) > due.end}
    return replace(ledger, checkpoints=later, released=inside)


def _after_release(settings: Settings, pins: Pins, base: Weights, ledger: Ledger, *, now: float) -> Ledger:
    """Let the pins of a decided window go; return a new ledger when another window is to be watched.

    That is so when the settings that decide have changed, and when a resumed run writes into the window again.
    """
    newest = max(seen.written for seen in ledger.released.values())
    end = max(map(int, ledger.released)) if settings.window == "auto" else settings.window
    live = Snapshot(base, Ledger(), scan(settings.checkpoints, base, now=now), now)
    again = [step for step, seen in live.known.items() if int(step) <= end and seen.written > newest]
    if not again and decided(settings, _key(settings, base, ledger.released)):
        pins.release()
        return ledger
    ledger = replace(ledger, checkpoints=ledger.checkpoints | ledger.released, released={})
    # Before anything is pinned: what is pinned while it says released, the next watcher deletes.
    write_ledger(settings, ledger)
    return ledger


def describe(
    settings: Settings,
    stored: tuple[StoredCheckpoint, ...],
    ledger: Ledger,
    due: DueWindow,
    *,
    vanished: Sequence[int] = (),
) -> tuple[float, str]:
    """Return how full the window is, in per cent, and one line for a reader.

    `vanished` are the steps that were deleted before they could be pinned whole.
    """
    newest = segment(stored, ledger.checkpoints)
    ready = [checkpoint.step for checkpoint in newest if checkpoint.state is State.READY]
    latest = max(ready, default=0)
    inside = [step for step in ready if step <= settings.end]
    window = f"window {'at most ' if settings.window == 'auto' else ''}{settings.end}"
    text = f"{settings.training_run}: step {latest}" + (
        f" of {window}, {len(inside)} checkpoints observed"
        if latest <= settings.end
        else f", {len(inside)} checkpoints in {window}"
    )
    if due.text:
        text += f"; {due.text}"
    if ledger.released:
        return 100.0, f"{settings.training_run}: window {due.end} is decided, its pins are released"
    blocking = next(
        (checkpoint for checkpoint in stored if checkpoint.step <= settings.end and checkpoint.state is State.BROKEN),
        None,
    )
    left = [checkpoint.step for checkpoint in stored if checkpoint not in newest and checkpoint.step <= settings.end]
    setting = setting_of(stored[0].directory) if stored else ""
    remedies = [f"raise {setting}"] if setting else []
    if settings.pin == "none":
        remedies.append("set pin: link")
    remedy = f"{', or '.join(remedies)}, and start the run anew" if remedies else "start the run anew"
    if pruned := lost(settings, stored, ledger):
        text += (
            f"; steps {_listed(pruned)} were observed and have been removed: no decision on this window."
            f" {remedy[0].upper()}{remedy[1:]}"
        )
    elif vanished:
        kept = f"Raise {setting} to 2 or more" if setting else "Read its checkpoints instead"
        text += (
            f"; steps {_listed(vanished)} were removed before they were whole: no decision on this window. {kept}; if"
            f" they are not wanted, delete them in {settings.pins}"
        )
    elif due.end is not None and full_window(newest, due.end):
        text += "; window full, decided" if due.closed else "; window full"
    elif left:
        text += (
            f"; steps {_listed(left)} were left behind by a run that resumed before them: waiting until it has written"
            " as far. If nothing was resumed, the files were copied in another order: touch them in the order of steps"
        )
    elif blocking is not None:
        text += f"; blocked by step {blocking.step}: {blocking.reason}"
    missing = holes([0, *inside])
    if missing:
        text += "; " + "; ".join(hole.text.rstrip(".") for hole in missing)
    return min(100.0, 100.0 * latest / settings.end), text


def _key(settings: Settings, base: Weights, checkpoints: dict[str, Seen]) -> str:
    return key_of(settings, base, {int(step): seen.identity for step, seen in checkpoints.items()})


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps))
