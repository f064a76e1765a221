"""The local stack: a Prefect server, an MLflow server, and whatever else runs in the background beside them.

Everything lies in one directory, the home: prefect/ and mlflow/ (databases and artifacts), logs/ and services/. Servers
listen on the loopback interface only, and let in whom the home's file auth says (see deploy.local.access).
"""

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from filelock import FileLock, Timeout

from deploy.errors import StackError
from deploy.local import daemon
from deploy.local.access import (
    access_file,
    client_environment,
    close_files,
    close_home,
    make_access,
    read_access,
)
from deploy.local.daemon import Daemon
from deploy.local.own_code import own_code
from deploy.local.server import (
    MLFLOW,
    NO_TELEMETRY,
    PREFECT,
    admits,
    answers,
    argv,
    is_outdated,
    launch,
    port_of,
    still_starting,
)
from deploy.tracking import prepare

__all__ = [
    "Daemon",
    "Stack",
    "down",
    "environment",
    "halt",
    "has_access",
    "how_to_enter",
    "how_to_enter_first",
    "running",
    "spawn",
    "status",
    "tracking_uri",
    "up",
]

_log = logging.getLogger(__name__)

_START_SECONDS = 120.0
# Longer than one `up` that waits for its servers in vain.
_LOCK_SECONDS = 300.0


@dataclass(frozen=True)
class Stack:
    """A running stack: its directory and the addresses of its two servers (Prefect's pages and API apart)."""

    home: Path
    prefect_url: str
    prefect_api_url: str
    mlflow_url: str


_SERVERS = (PREFECT, MLFLOW)


def up(home: Path, *, on_progress: Callable[[str], None] | None = None) -> Stack:
    """Start what is not running of the two servers, both at once, and return when both answer.

    Servers of this home that answer with the installed version are left alone, whoever started them. StackError with
    the end of its log for one that does not answer within 120 s or ends before, and for one that asks for another
    password than the home's. The first time, a password is made.
    """
    report = on_progress or _log.info
    home = _home(home)
    with _locked(home), httpx.Client(trust_env=False, timeout=5) as client:
        _refuse_former(home)
        make_access(home)
        access = read_access(home)
        began = time.monotonic()
        waiting = {}
        for server in _SERVERS:
            started = daemon.find(home, server.name)
            if (
                started is not None
                and started.state == "running"
                and answers(client, home, started, server)
                and is_outdated(client, started, server, access)
            ):
                report(f"restarting {server.name}: another version of it is running")
                daemon.stop(home, [server.name])
                started = daemon.find(home, server.name)
            if started is None or started.state != "running":
                report(f"starting {server.name}")
                started = launch(home, server)
            waiting[server] = started
        while waiting:
            for server, started in list(waiting.items()):
                seconds = time.monotonic() - began
                if answers(client, home, started, server) and admits(client, started, server, access):
                    del waiting[server]
                    report(f"{server.name} answers at {started.url} after {seconds:.1f} s")
                else:
                    waiting[server] = still_starting(home, started, server, seconds=seconds, limit=_START_SECONDS)
            time.sleep(0.1)
        close_files(home)
    return running(home)


def has_access(home: Path) -> bool:
    """Return whether the home says who may use its stack; if not, `up` makes a password."""
    return access_file(_home(home)).exists()


def how_to_enter(home: Path) -> str:
    """Return who is let in by the stack of this home, for a person, without the password."""
    path = access_file(_home(home))
    if read_access(_home(home)) is None:
        return f"No password: anyone on this machine may run commands as you. {path} says so."
    return f"The pages ask for the user and the password in {path}."


def how_to_enter_first(home: Path) -> str:
    """Return how the pages of a running stack are opened by addresses with the password in them."""
    stack = running(home)
    path, access = access_file(stack.home), read_access(stack.home)
    if access is None:
        return how_to_enter(home)
    return (
        f"A password was made and is shown this once; it lies in {path}. The pages, already let in:\n"
        f"  Prefect: {access.enter(stack.prefect_url)}\n  MLflow:  {access.enter(stack.mlflow_url)}"
    )


def running(home: Path) -> Stack:
    """Return the stack of this home, and let this process in; StackError where one of its servers is not running."""
    home = _home(home)
    _enter(home)
    urls = {}
    for server in _SERVERS:
        started = daemon.find(home, server.name)
        if started is None or started.state != "running" or started.url is None:
            state = "was never started" if started is None else f"is {started.state}"
            raise StackError(f"{server.name} {state} in {home}. Start the stack with `relex up`.")
        urls[server.name] = started.url
    return Stack(home, urls["prefect"], f"{urls['prefect']}/api", urls["mlflow"])


def environment(stack: Stack) -> dict[str, str]:
    """Return the variables that make a child process use this stack."""
    return {
        **NO_TELEMETRY,
        **own_code(os.environ),
        "PREFECT_HOME": str(stack.home / "prefect"),
        "PREFECT_API_URL": stack.prefect_api_url,
        # From event to user code about 3 s instead of 6.
        "PREFECT_RUNNER_POLL_FREQUENCY": "2",
        # What these log is shown beside the flow run too.
        "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,relex,evaluation,deploy",
        "MLFLOW_TRACKING_URI": stack.mlflow_url,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
        **client_environment(read_access(stack.home)),
    }


def tracking_uri(home: Path) -> str:
    """Return where this home's registry is read, and let this process in.

    That is its MLflow server, or its database while the server is not running.
    """
    _enter(_home(home))
    mlflow = daemon.find(_home(home), "mlflow")
    if mlflow is not None and mlflow.state == "running" and mlflow.url is not None:
        return mlflow.url
    close_home(_home(home))
    return prepare(_home(home) / "mlflow").tracking_uri


def spawn(home: Path, name: str, argv: Sequence[str], *, environment: Mapping[str, str] | None = None) -> Daemon:
    """Start a named process in the background, its environment added to the caller's; a live one is left alone.

    StackError where a live one of this name does something else.
    """
    home = _home(home)
    with _locked(home):
        live = daemon.find(home, name)
        if live is not None and live.state == "running":
            if live.argv != tuple(argv):
                raise StackError(
                    f"{name} is running as `{' '.join(live.argv)}` and was asked for as `{' '.join(argv)}`."
                    " Stop it with `relex down`, or give one of the two another name."
                )
            return live
        return daemon.start(home, name, argv, environment={**os.environ, **(environment or {})})


def status(home: Path) -> list[Daemon]:
    """Return every process that was ever started in this home, servers first."""
    return sorted(daemon.find_all(_home(home)), key=lambda process: not _is_server(process.name))


def down(home: Path) -> list[Daemon]:
    """Stop the spawned processes, then the servers, and return them stopped; nothing of theirs is left running.

    What was spawned and was not stopped by itself resumes: see `Daemon.resumes`.
    """
    home = _home(home)
    with _locked(home):
        names = [process.name for process in daemon.find_all(home)]
        daemon.stop(home, [name for name in names if not _is_server(name)], resumes=True)
        daemon.stop(home, [name for name in names if _is_server(name)])
    return status(home)


def halt(home: Path, name: str) -> None:
    """Stop one spawned process until it is spawned again by name."""
    home = _home(home)
    with _locked(home):
        daemon.stop(home, [name])


def _enter(home: Path) -> None:
    # In the environment and not in the address, which is shown and recorded.
    os.environ.update(client_environment(read_access(home)))


def _refuse_former(home: Path) -> None:
    """Refuse servers that an earlier version started, which let anyone in, and those that outlived their password."""
    for server in _SERVERS:
        former = daemon.find(home, server.name)
        if former is None or former.state != "running":
            continue
        again = "Run `relex down`, then `relex up`."
        if list(former.argv) != argv(home, server, port_of(former)):
            raise StackError(f"{server.name} was started by another version of relex, and may let anyone in. {again}")
        if not access_file(home).exists():
            raise StackError(f"{server.name} runs and {access_file(home)}, which says who may use it, is gone. {again}")


def _is_server(name: str) -> bool:
    return name in {server.name for server in _SERVERS}


def _home(home: Path) -> Path:
    return home.expanduser().resolve()


@contextmanager
def _locked(home: Path) -> Iterator[None]:
    close_home(home)
    try:
        with FileLock(home / ".stack.lock", timeout=_LOCK_SECONDS, mode=0o600):
            yield
    except Timeout as error:
        raise StackError(
            f"another `relex up` or `relex down` holds {home} for {_LOCK_SECONDS:.0f} s. End it."
        ) from error
