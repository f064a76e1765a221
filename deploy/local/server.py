"""A server of the local stack: how the Prefect and the MLflow server are started, and when each of them answers."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from deploy.errors import StackError
from deploy.local import daemon
from deploy.local.access import Access, mlflow_environment, prefect_environment, read_access
from deploy.local.daemon import Daemon
from deploy.local.port import HOST, free_port, is_free, listens
from deploy.tracking import prepare

# Told to every process of the stack.
NO_TELEMETRY = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

_REFUSALS = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True)
class Server:
    """One of the two servers: its package and process name, the preferred port, the paths of its health and version."""

    name: str
    port: int
    health: str
    version: str


PREFECT = Server("prefect", 4200, "/api/health", "/api/admin/version")
MLFLOW = Server("mlflow", 5000, "/health", "/version")


def launch(home: Path, server: Server) -> Daemon:
    """Start a server on the loopback interface, at the port it had before or prefers, else at a free one.

    It asks for the user and password of `HOME/auth` where that is there.
    """
    access = read_access(home)
    former = daemon.find(home, server.name)
    # Before the choice: a killed MLflow server leaves a worker that holds the port.
    daemon.stop(home, [server.name])
    # Pages people have open and processes that still run find it again.
    preferred = server.port if former is None else _port(former)
    port = preferred if is_free(preferred) else free_port()
    return daemon.start(
        home,
        server.name,
        _argv(home, server, port, access),
        environment=_environment(home, server, port, access),
        url=f"http://{HOST}:{port}",
    )


def answers(client: httpx.Client, home: Path, started: Daemon, server: Server) -> bool:
    """Return whether this home's own process answers at the server's address."""
    try:
        healthy = client.get(f"{started.url}{server.health}").is_success
    except httpx.TransportError:
        return False
    # The port may have gone to a stranger, another home's server for one, between the choice and the bind.
    return healthy and listens(daemon.processes(home, server.name), port=_port(started))


def is_outdated(client: httpx.Client, started: Daemon, server: Server) -> bool:
    """Return whether a running server answers with another version than the one that is installed."""
    try:
        answer = client.get(f"{started.url}{server.version}")
    except httpx.TransportError:
        return False
    return answer.is_success and answer.text.strip('"\n') != version(server.name)


def admits(client: httpx.Client, started: Daemon, server: Server, access: Access | None) -> bool:
    """Return whether a server that answers lets in who may; StackError where it asks for something else than `access`.

    `access` is what `HOME/auth` says. False where the server does not answer in time.
    """
    url = f"{started.url}{server.version}"
    try:
        asks = client.get(url).status_code == httpx.codes.UNAUTHORIZED
        refuses = access is not None and client.get(url, auth=(access.user, access.password)).status_code in _REFUSALS
    except httpx.TransportError:
        return False
    if asks and access is None:
        raise StackError(f"{server.name} asks for a password and the file auth is gone. Run `relex down` first.")
    if not asks and access is not None:
        raise StackError(f"{server.name} was started before the file auth and asks nobody. Run `relex down` first.")
    if refuses:
        own = " MLflow keeps its users itself: change the password there, or delete mlflow/users.db in the same place."
        raise StackError(
            f"{server.name} refuses the user and password of the file auth. Run `relex down` first."
            f"{own if server == MLFLOW else ''}"
        )
    return True


def still_starting(home: Path, started: Daemon, server: Server, *, seconds: float, limit: float) -> Daemon:
    """Return the process to go on waiting for, after it has not answered for `seconds`.

    That is another one where a stranger took the port first; StackError where the process ended or `limit` has passed.
    """
    now = daemon.find(home, server.name)
    if now is not None and now.state == "running" and seconds < limit:
        return started
    daemon.stop(home, [server.name])
    if seconds < limit and not is_free(_port(started)):
        return launch(home, server)
    ending = "ended" if seconds < limit else f"did not answer within {limit:.0f} s"
    raise StackError(f"{server.name} {ending}: {daemon.last_log_line(started.log)}. Its log is {started.log}.")


def _argv(home: Path, server: Server, port: int, access: Access | None) -> list[str]:
    argv = [sys.executable, "-m", server.name, "server"]
    address = ["--host", HOST, "--port", str(port)]
    if server == PREFECT:
        return [*argv, "start", *address]
    store = prepare(home / "mlflow")
    places = ["--backend-store-uri", store.tracking_uri, "--default-artifact-root", str(store.artifacts)]
    # Clients on this file system read and write the artifacts themselves; nothing is left to be passed through.
    asking = [] if access is None else ["--app-name", "basic-auth"]
    return [*argv, *address, *places, "--no-serve-artifacts", "--workers", "1", *asking]


def _environment(home: Path, server: Server, port: int, access: Access | None) -> dict[str, str]:
    # What the caller set for other servers must not reach these.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    return {
        **inherited,
        **NO_TELEMETRY,
        "PREFECT_HOME": str(home / "prefect"),
        # Its pages would ask port 4200, whatever the port that it was given.
        "PREFECT_SERVER_UI_API_URL": f"http://{HOST}:{port}/api",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        **(
            prefect_environment(access)
            if server == PREFECT
            else mlflow_environment(access, users=home / "mlflow/users.db")
        ),
    }


def _port(started: Daemon) -> int:
    return int(str(started.url).rsplit(":", 1)[1])
