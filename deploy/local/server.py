"""A server of the local stack: how the Prefect and the MLflow server are started, and when each of them answers."""

import os
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import httpx

from deploy.errors import StackError
from deploy.local import daemon
from deploy.local.access import Access
from deploy.local.daemon import Daemon
from deploy.local.port import HOST, free_port, is_free, listens
from deploy.tracking import prepare

# Told to every process of the stack.
NO_TELEMETRY = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

_REFUSALS = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@dataclass(frozen=True)
class Server:
    """One of the two servers: name of package and process, its factory, preferred port, paths of health and version."""

    name: str
    app: str
    port: int
    health: str
    version: str


PREFECT = Server("prefect", "prefect.server.api.server:create_app", 4200, "/api/health", "/api/admin/version")
MLFLOW = Server("mlflow", "deploy.local.mlflow_app:create", 5000, "/health", "/version")


def launch(home: Path, server: Server) -> Daemon:
    """Start a server on the loopback interface, at the port it had before or prefers, else at a free one.

    It lets in whom `HOME/auth` says (see deploy.local.gate), which must be there.
    """
    former = daemon.find(home, server.name)
    # Before the choice: what a killed server leaves may hold the port.
    daemon.stop(home, [server.name])
    # Pages people have open and processes that still run find it again.
    preferred = server.port if former is None else port_of(former)
    port = preferred if is_free(preferred) else free_port()
    return daemon.start(
        home,
        server.name,
        argv(home, server, port),
        environment=_environment(home, server, port),
        url=f"http://{HOST}:{port}",
    )


def answers(client: httpx.Client, home: Path, started: Daemon, server: Server) -> bool:
    """Return whether this home's own process answers at the server's address."""
    # First: the port may have gone to a stranger, another user's for one, between the choice and the bind, and what is
    # asked afterwards has the password in it.
    if not listens(daemon.processes(home, server.name), port=port_of(started)):
        return False
    try:
        answer = client.get(f"{started.url}{server.health}")
    except httpx.TransportError:
        return False
    return answer.is_success or answer.status_code == httpx.codes.UNAUTHORIZED


def is_outdated(client: httpx.Client, started: Daemon, server: Server, access: Access | None) -> bool:
    """Return whether a running server answers with another version than the one that is installed."""
    try:
        answer = client.get(f"{started.url}{server.version}", headers=_headers(access))
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
        refuses = access is not None and client.get(url, headers=_headers(access)).status_code in _REFUSALS
    except httpx.TransportError:
        return False
    if asks and access is None:
        raise StackError(f"{server.name} asks for a password and the file auth says none. Run `relex down` first.")
    if not asks and access is not None:
        raise StackError(f"{server.name} asks nobody and the file auth has a password. Run `relex down` first.")
    if refuses:
        raise StackError(f"{server.name} refuses the user and password of the file auth. Run `relex down` first.")
    return True


def still_starting(home: Path, started: Daemon, server: Server, *, seconds: float, limit: float) -> Daemon:
    """Return the process to go on waiting for, after it has not answered for `seconds`.

    That is another one where a stranger took the port first; StackError where the process ended or `limit` has passed.
    """
    now = daemon.find(home, server.name)
    if now is not None and now.state == "running" and seconds < limit:
        return started
    daemon.stop(home, [server.name])
    if seconds < limit and not is_free(port_of(started)):
        return launch(home, server)
    ending = "ended" if seconds < limit else f"did not answer within {limit:.0f} s"
    raise StackError(f"{server.name} {ending}: {daemon.last_log_line(started.log)}. Its log is {started.log}.")


def argv(home: Path, server: Server, port: int) -> list[str]:
    """Return the command of a server."""
    return [sys.executable, "-P", "-m", "deploy.local.gate", str(home), server.app, str(port)]


def _environment(home: Path, server: Server, port: int) -> dict[str, str]:
    # What the caller set for other servers must not reach these.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("PREFECT_", "MLFLOW_"))}
    own = f"http://{HOST}:{port}"
    if server == PREFECT:
        return {
            **inherited,
            **NO_TELEMETRY,
            "PREFECT_HOME": str(home / "prefect"),
            # Its pages would ask port 4200, whatever the port that it was given.
            "PREFECT_SERVER_UI_API_URL": f"{own}/api",
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": own,
        }
    store = prepare(home / "mlflow")
    return {
        **inherited,
        **NO_TELEMETRY,
        "MLFLOW_BACKEND_STORE_URI": store.tracking_uri,
        # Clients on this file system read and write the artifacts themselves; nothing is left to be passed through.
        "MLFLOW_DEFAULT_ARTIFACT_ROOT": str(store.artifacts),
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": own,
        "MLFLOW_SERVER_ALLOWED_HOSTS": f"{HOST}:{port}",
    }


def port_of(started: Daemon) -> int:
    """Return the port of a server."""
    return int(str(started.url).rsplit(":", 1)[1])


def _headers(access: Access | None) -> dict[str, str]:
    return {} if access is None else {"Authorization": access.authorization}
