"""The training runs that a stack watches, one by one: what each is at, and what it waits for."""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from deploy.local.daemon import Daemon, find
from flows.errors import ConfigError, WatchError
from flows.processes import watched, watcher
from flows.reground.settings import is_reground
from flows.settings import Settings, load_settings
from flows.state.decision import Decision
from flows.state.windows import read_decisions, window_directory
from flows.watch.standing import read_standing, wait_for_look

# Servers of a busy machine take as long to start a flow run.
FIRST_LOOK_SECONDS = 180.0
# A watcher looks every few seconds; this long ago is said.
_LATELY_SECONDS = 120.0

_WAITING = "waiting for room"


@dataclass(frozen=True)
class Run:
    """A training run by its config, and in one line what it is at; `progress` is how full its window is, in per cent.

    `seen` is when that was seen (seconds since the epoch), None where its watcher has not looked. `decided` is the last
    verdict in one line with its address, "" where there is none.
    """

    config: str
    text: str
    progress: float = 0.0
    seen: float | None = None
    decided: str = ""


@dataclass(frozen=True)
class Told:
    """A training run, its newest decision, the file with the page of that, and the log of the watcher."""

    run: Run
    decision: Decision | None
    page: Path | None
    log: Path


def run_of(process: Daemon) -> Run | None:
    """Return what the training run of a process is at; None where it watches none."""
    config = watched(process)
    if config is None or is_reground(config):
        return None
    name = process.name.partition("-")[2]
    try:
        settings = load_settings(config, look=True)
    except ConfigError as error:
        return Run(str(config), f"{name}: {error}")
    standing, decided = read_standing(settings), _verdict(read_decisions(settings))
    if standing is None and process.state == "running":
        return Run(str(config), f"{name}: {_waits(process)}", decided=decided)
    if standing is None:
        return Run(str(config), f"{name}: its watcher is {process.state} ({process.log})", decided=decided)
    age = time.time() - standing.at
    text = standing.text
    if process.state != "running":
        text += f" (its watcher is {process.state})"
    elif age > _LATELY_SECONDS:
        text += f" (seen {age / 60:.0f} minutes ago; {process.log} may say why)"
    return Run(str(config), text, standing.progress, standing.at, decided)


def _waits(process: Daemon) -> str:
    """Return what a watcher without a word in the state directory waits for: where there is no room, its log has it."""
    lines = process.log.read_text(errors="replace").splitlines() if process.log.is_file() else []
    waits = [line[line.index(_WAITING) :] for line in lines if _WAITING in line]
    return waits[-1] if waits else f"its watcher has not looked yet ({process.log})"


def _without_room(process: Daemon, since: float) -> bool:
    """Tell whether the last that a watcher has logged since it was started is that there is no room."""
    if not process.log.is_file() or process.log.stat().st_mtime < since:
        return False
    return _WAITING in (process.log.read_text(errors="replace").splitlines() or [""])[-1]


def tell(home: Path, name: str) -> Told:
    """Return all there is to say of one training run; WatchError where none of that name is watched."""
    process = watcher(home, name)
    config, run = watched(process), run_of(process)
    if config is None or run is None:
        raise WatchError(f"{name} is re-grounded: its page is reground-{name} in Prefect, its log {process.log}.")
    settings = load_settings(config, look=True)
    decisions = read_decisions(settings)
    newest = decisions[-1] if decisions else None
    page = None if newest is None else window_directory(settings, newest.key) / "decision.md"
    return Told(run, newest, page, process.log)


def _verdict(decisions: Sequence[Decision]) -> str:
    if not decisions:
        return ""
    newest = decisions[-1]
    # The reason is that of the gate, with its numbers, where there was one.
    said = " ".join(gate.sentence for gate in (*newest.gates, *newest.guards)) or newest.reason
    what = f"{newest.verdict}{f' as {newest.registered}' if newest.registered else ''}"
    where = newest.registered_url or newest.record_url
    return f"{newest.training_run}: window {newest.window} is decided, {what}: {said}{f' {where}' if where else ''}"


def watched_settings(processes: Sequence[Daemon]) -> dict[Path, Settings]:
    """Return the settings of the training runs whose watchers are running, by their configs."""
    readable = {}
    for process in processes:
        config = watched(process)
        if config is None or process.state != "running" or is_reground(config):
            continue
        # Of one that was moved or is being edited its own line says so.
        with suppress(ConfigError):
            readable[config] = load_settings(config)
    return readable


def wait_for_looks(home: Path, watchers: Sequence[Daemon], *, seconds: float = FIRST_LOOK_SECONDS) -> None:
    """Wait until every one of the processes has looked since it was started, has ended, or `seconds` have passed.

    One that has no room to say what it sees has looked.
    """
    end = time.monotonic() + seconds
    for process in watchers:
        config = watched(process)
        if config is None or process.pid is None or is_reground(config):
            continue
        # A config that is gone is said by the run's own line.
        with suppress(ConfigError):
            _wait(home, process, load_settings(config), seconds=end - time.monotonic())


def _wait(home: Path, process: Daemon, settings: Settings, *, seconds: float) -> None:
    try:
        since = psutil.Process(process.pid).create_time()
    except psutil.NoSuchProcess:
        since = time.time()

    def lives() -> bool:
        service = find(home, process.name)
        return service is not None and service.state == "running" and not _without_room(process, since)

    wait_for_look(settings, since, seconds=seconds, lives=lives)
