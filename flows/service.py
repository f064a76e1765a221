"""A background process: started in a session of its own, recorded in a file, found again and stopped by anyone.

The record holds the pid with the time the process was created, so that a pid the system gave to another process since is
never taken for ours. HOME/services/NAME.json is the record, HOME/logs/NAME.log what the process wrote.
"""

import json
import os
import re
import shutil
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from flows.errors import StackError

# Clock corrections move a creation time by less, and no system hands the same pid out again sooner.
_SAME_PROCESS_SECONDS = 2.0
_TERM_SECONDS = 15.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Service:
    """A background process; `pid` is None unless it is running, and "dead" one that was not stopped by `stop`."""

    name: str
    pid: int | None
    url: str | None
    state: Literal["running", "stopped", "dead"]
    log: Path


def start(
    home: Path, name: str, argv: Sequence[str], *, environment: Mapping[str, str], url: str | None = None
) -> Service:
    """Start `argv` with exactly this environment and return it running; StackError where there is no such program."""
    if not re.fullmatch(r"[\w.-]+", name):
        raise StackError(f"{name!r} is no name for a background process. Use letters, digits, '.', '_' and '-'.")
    program = shutil.which(argv[0])
    if program is None:
        raise StackError(f"{argv[0]} is not a program, so {name} cannot start. Name one that is on the path.")
    log = home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    pid = os.posix_spawn(
        program,
        argv,
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        # A shell starts its background jobs with SIGINT ignored, and a Prefect runner that inherits this hangs on SIGTERM.
        setsigdef=[signal.SIGINT],
        setsigmask=[],
    )
    record = {"argv": list(argv), "pid": pid, "create_time": psutil.Process(pid).create_time(), "url": url}
    _write(home, name, record)
    return Service(name, pid, url, "running", log)


def find(home: Path, name: str) -> Service | None:
    """Return the service of this name, running or not, or None where none was ever started."""
    return _service(home, name, record) if (record := _read(home, name)) else None


def find_all(home: Path) -> list[Service]:
    """Return every service that was ever started in `home`, by name."""
    names = sorted(path.stem for path in (home / "services").glob("*.json"))
    return [service for name in names if (service := find(home, name))]


def processes(home: Path, name: str) -> list[psutil.Process]:
    """Return the live processes of a service: it, its descendants, and what else lives in the session it opened."""
    record = _read(home, name)
    if record is None or record["pid"] is None:
        return []
    pid = int(record["pid"])
    found: set[psutil.Process] = set()
    try:
        leader = psutil.Process(pid)
        if abs(leader.create_time() - float(record["create_time"])) > _SAME_PROCESS_SECONDS:
            # A pid is not handed out again while its session has members: nothing of ours is left.
            return []
        found = {leader, *leader.children(recursive=True)}
    except psutil.NoSuchProcess:
        pass
    return [process for process in found | set(_session(pid)) if _lives(process)]


def stop(home: Path, names: Iterable[str]) -> None:
    """Stop services together: SIGTERM to each, then to what it left behind, then SIGKILL; returns when all are gone."""
    names = [name for name in names if _read(home, name)]
    members = {name: processes(home, name) for name in names}
    everyone = [process for group in members.values() for process in group]
    leaders = [process for process in everyone if process.pid == os.getsid(process.pid)]
    # A server or runner that is asked alone ends its own children in order.
    _signal(leaders or everyone, signal.SIGTERM)
    _, left = psutil.wait_procs(everyone if leaders else [], timeout=_TERM_SECONDS)
    _signal(left, signal.SIGTERM)
    _, left = psutil.wait_procs(left or everyone, timeout=_KILL_SECONDS)
    _signal(left, signal.SIGKILL)
    psutil.wait_procs(left, timeout=_KILL_SECONDS)
    for name in names:
        record = _read(home, name)
        if record is not None:
            _write(home, name, {**record, "pid": None, "create_time": None})
