"""The watcher of one training run: looks at the store, announces what is due.

`watch` runs a while and ends, so that the server keeps a live, short list of runs; a schedule starts the next one. What
was announced is in the ledger, so a watcher that is killed and started again announces nothing twice.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State as RunState
from prefect.events import emit_event
from prefect.states import Completed

from flows.errors import WatchError
from flows.ledger import Ledger, due, lost, read_ledger, tick, write_ledger
from flows.lock import held
from flows.settings import Settings, load_settings
from relex.layouts.files import open_directory
from relex.store import State, StoredCheckpoint, open_base, scan

logger = logging.getLogger(__name__)

RUN_SECONDS = 540.0
SCHEDULE_SECONDS = 600.0

Look = Callable[[float, str], None]
"""Called after every look at the store, with how full the window is in per cent and one line for a reader."""


def watch_store(settings: Settings, *, seconds: float, on_look: Look | None = None) -> None:
    """Look at the store every `poll_seconds` for `seconds`, and send what is due.

    Raises WatchError when another watcher of this training run is at work. A store or base that is not there yet is
    waited for.
    """
    settings.home.mkdir(parents=True, exist_ok=True)
    path = settings.home / "watcher.lock"
    with held(path, seconds=2.0) as mine:
        if not mine:
            raise WatchError(
                f"training run {settings.training_run} is watched by another process (it holds {path})."
                " Stop that one first."
            )
        end = time.monotonic() + seconds
        while True:
            _look(settings, on_look)
            if time.monotonic() + settings.poll_seconds > end:
                return
            time.sleep(settings.poll_seconds)


def _look(settings: Settings, on_look: Look | None) -> None:
    base_directory = open_directory(settings.base)
    there = base_directory.exists() and "config.json" in base_directory.files()
    if not there or not open_directory(settings.checkpoints).exists():
        logger.info("waiting for %s and %s", settings.base, settings.checkpoints)
        return
    now = time.time()
    base = open_base(settings.base)
    stored = scan(settings.checkpoints, base, now=now)
    before = read_ledger(settings)
    events, ledger = tick(settings, base, stored, before, now=now)
    for event in events:
        emit_event(event.name, {"prefect.resource.id": event.resource}, payload=event.payload, id=event.id)
        logger.info("%s %s", event.name, event.payload)
    # After sending: what a crash in between repeats has the same id, and is claimed once.
    if ledger != before:
        write_ledger(settings, ledger)
    if on_look is not None:
        on_look(*describe(settings, stored, ledger))


@flow(name="watch", retries=0, validate_parameters=False)
def watch(config: str, seconds: float = RUN_SECONDS) -> RunState[Any]:
    """Watch the training run described in the file `config`; progress is an artifact of the flow run."""
    settings = load_settings(Path(config))
    artifact: Any = create_progress_artifact(0.0, key=f"window-{settings.training_run}", description="looking")
    shown = ""

    def show(progress: float, text: str) -> None:
        nonlocal shown
        if text != shown:
            shown = text
            update_progress_artifact(artifact, progress, description=text)

    try:
        watch_store(settings, seconds=seconds, on_look=show)
    except WatchError as error:
        return Completed(message=str(error))
    return Completed(message=shown)


def describe(settings: Settings, stored: tuple[StoredCheckpoint, ...], ledger: Ledger) -> tuple[float, str]:
    """Return how full the window is, in per cent, and one line for a reader."""
    ready = [item.step for item in stored if item.state is State.READY]
    latest = max(ready, default=0)
    inside = [step for step in ready if step <= settings.window]
    text = f"{settings.training_run}: step {latest} of window {settings.window}, {len(inside)} checkpoints observed"
    blocking = next((item for item in stored if item.step <= settings.window and item.state is State.BROKEN), None)
    if pruned := lost(settings, stored, ledger):
        text += (
            f"; steps {', '.join(map(str, pruned))} were observed and have been removed: no decision on this window."
            " Raise the trainer's number of kept checkpoints (save_total_limit) and start the run anew"
        )
    elif left := [step for step in ledger.stale if step <= settings.window]:
        text += (
            f"; steps {', '.join(map(str, left))} were left behind by a run that resumed before them: waiting until"
            " they are written again. If they will not be, delete them"
        )
    elif blocking is not None:
        text += f"; blocked by step {blocking.step}: {blocking.reason}"
    elif due(settings, stored):
        text += "; window full"
    return min(100.0, 100.0 * latest / settings.window), text
