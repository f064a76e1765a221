"""A background process: started in a session of its own, recorded in a file, found again and stopped by anyone.

The record holds the pid with the time the process was created, so that a pid the system gave to another process since
is never taken for ours. HOME/services/NAME.json is the record, HOME/logs/NAME.log what the process wrote.
"""

import contextlib
import json
import os
import re
import shutil
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from deploy.errors import StackError
from deploy.files import write_file

# Clock corrections move a creation time by less, and no system hands the same pid out again sooner.
_SAME_PROCESS_SECONDS = 2.0
_TERM_SECONDS = 15.0
_KILL_SECONDS = 5.0


@dataclass(frozen=True)
class Daemon:
    """A background process; `pid` is None unless it is running, and "dead" one that was not stopped by `stop`.

    `resumes` is whether it was stopped only until the others are started again.
    """

    name: str
    pid: int | None
    url: str | None
    state: Literal["running", "stopped", "dead"]
    log: Path
    argv: tuple[str, ...]
    resumes: bool = False


def start(
    home: Path, name: str, argv: Sequence[str], *, environment: Mapping[str, str], url: str | None = None
) -> Daemon:
    """Start `argv` with exactly this environment and return it running, after ending what a former one left behind.

    StackError where there is no such program or the name cannot be a file's.
    """
    if not re.fullmatch(r"[\w.-]+", name):
        raise StackError(f"{name!r} is no name for a background process. Use letters, digits, '.', '_' and '-'.")
    program = shutil.which(argv[0])
    if program is None:
        raise StackError(f"{argv[0]} is not a program, so {name} cannot start. Name one that is on the path.")
    stop(home, [name])
    log = home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    pid = os.posix_spawn(
        program,
        list(argv),
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        # A shell's background jobs ignore SIGINT, and a Prefect runner that inherits this hangs on SIGTERM.
        setsigdef=[signal.SIGINT],
        setsigmask=[],
    )
    record = {"argv": list(argv), "pid": pid, "create_time": psutil.Process(pid).create_time(), "url": url}
    _write(home, name, record)
    return Daemon(name, pid, url, "running", log, tuple(argv))


def find(home: Path, name: str) -> Daemon | None:
    """Return the process of this name, running or not, or None where none was ever started."""
    return _daemon(home, name, record) if (record := _read(home, name)) else None


def find_all(home: Path) -> list[Daemon]:
    """Return every process that was ever started in `home`, by name."""
    names = sorted(path.stem for path in (home / "services").glob("*.json"))
    return [daemon for name in names if (daemon := find(home, name))]


def processes(home: Path, name: str) -> list[psutil.Process]:
    """Return the live processes of a daemon: it, its descendants, and what else lives in the session it opened."""
    record = _read(home, name)
    if record is None or record["pid"] is None:
        return []
    pid = int(record["pid"])
    family: set[psutil.Process] = set()
    try:
        leader = psutil.Process(pid)
        if abs(leader.create_time() - float(record["create_time"])) > _SAME_PROCESS_SECONDS:
            # A pid is not handed out again while its session has members: nothing of ours is left.
            return []
        family = {leader, *leader.children(recursive=True)}
    except psutil.NoSuchProcess:
        pass
    return [process for process in family | set(_session(pid)) if _lives(process)]


def stop(home: Path, names: Iterable[str], *, resumes: bool = False) -> None:
    """Stop daemons together: SIGTERM to each, then to what it left behind, then SIGKILL; returns when all are gone.

    Where they resume, those that were running or had died are said to; one that was stopped before stays what it was.
    """
    records = {name: record for name in names if (record := _read(home, name))}
    members = [process for name in records for process in processes(home, name)]
    # Asked alone, a server or a runner ends its own children in order.
    leaders = [process for process in members if process.pid in {record["pid"] for record in records.values()}]
    _end(leaders, signal.SIGTERM, seconds=_TERM_SECONDS)
    for number in (signal.SIGTERM, signal.SIGKILL):
        late = [process for name in records for process in processes(home, name)]
        _end([*{*members, *late}], number, seconds=_KILL_SECONDS)
    for name, record in records.items():
        again = resumes and (record["pid"] is not None or record.get("resumes", False))
        _write(home, name, {**record, "pid": None, "create_time": None, "resumes": again})


def last_log_line(log: Path, *, start: int = 0, but: re.Pattern[str] | None = None) -> str:
    """Return the last line that a process wrote to its log, from the byte `start` on, leaving out those that match."""
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    said = [line for line in lines if but is None or not but.search(line)]
    return said[-1].strip() if said else "it wrote nothing"


def _end(group: Sequence[psutil.Process], number: signal.Signals, *, seconds: float) -> None:
    group = [process for process in group if _lives(process)]
    for process in group:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    psutil.wait_procs(group, timeout=seconds)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _session(leader: int) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader:
                yield process


def _daemon(home: Path, name: str, record: Mapping[str, Any]) -> Daemon:
    pid, url, log, argv = record["pid"], record["url"], home / "logs" / f"{name}.log", tuple(record["argv"])
    if pid is None:
        return Daemon(name, None, url, "stopped", log, argv, bool(record.get("resumes", False)))
    if any(process.pid == pid for process in processes(home, name)):
        return Daemon(name, pid, url, "running", log, argv)
    return Daemon(name, None, url, "dead", log, argv)


def _read(home: Path, name: str) -> dict[str, Any] | None:
    try:
        record: dict[str, Any] = json.loads((home / "services" / f"{name}.json").read_bytes())
    except FileNotFoundError:
        return None
    return record


def _write(home: Path, name: str, record: Mapping[str, Any]) -> None:
    path = home / "services" / f"{name}.json"
    write_file(path, json.dumps(record))
    path.chmod(0o600)
