"""Who is let in: the servers are on the loopback interface, and ask for the password of the home's file auth."""

import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from deploy.errors import StackError
from deploy.local import daemon, stack
from deploy.local.access import client_environment, read_access
from deploy.local.server import PREFECT, admits
from deploy.local.stack import Stack
from deploy.registry import models
from deploy.runs import record
from flows.cli import main

USER, PASSWORD = "somebody", "no-one-may-read-this"


def write_auth(home: Path, content: str, *, mode: int = 0o600) -> Path:
    path = home / "auth"
    path.write_text(content)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack with a password."""
    home = tmp_path_factory.mktemp("closed")
    write_auth(home, f"{USER}:{PASSWORD}\n")
    with pytest.MonkeyPatch.context() as patch:
        # Given back to the tests of other modules.
        for variable in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
            patch.setenv(variable, "")
        try:
            yield stack.up(home)
        finally:
            stack.down(home)


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_server_listens_on_the_loopback_interface_only(running: Stack, name: str) -> None:
    addresses = {
        connection.laddr.ip
        for process in daemon.processes(running.home, name)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_a_request_without_the_password_is_refused_by_both(running: Stack) -> None:
    mlflow = f"{running.mlflow_url}/api/2.0/mlflow/experiments/search?max_results=1"
    artifact = f"{running.mlflow_url}/get-artifact?path=a&run_uuid=b"
    protected = (f"{running.prefect_api_url}/admin/version", mlflow, artifact, running.mlflow_url)
    with httpx.Client(trust_env=False, timeout=60) as client:
        assert {url: client.get(url).status_code for url in protected} == dict.fromkeys(protected, 401)
        wrong = (USER, f"{PASSWORD}!")
        assert {url: client.get(url, auth=wrong).status_code for url in protected} == dict.fromkeys(protected, 401)
        for url in protected[:2]:
            assert client.get(url, auth=(USER, PASSWORD)).status_code == 200


def test_what_is_ours_is_let_in(running: Stack) -> None:
    uri = stack.tracking_uri(running.home)
    made = record("closed", tracking_uri=uri, key="once", title="with a password")
    assert PASSWORD not in str(made.url)
    assert models("closed", tracking_uri=uri) == []
    with temporary_settings(_prefect(running)), get_client(sync_client=True) as client:
        assert client.read_flows() == []


def test_the_password_is_in_no_file_command_line_or_status(
    running: Stack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["status"], ["status", "--json"], ["models", "closed", "--json"]):
        monkeypatch.setattr(sys, "argv", ["relex", *arguments, "--home", str(running.home)])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert not end.value.code
    told = capsys.readouterr()
    assert "prefect" in told.out
    processes = [process for name in ("prefect", "mlflow") for process in daemon.processes(running.home, name)]
    assert len(processes) >= 3
    lines = [" ".join(process.cmdline()) for process in processes]
    assert not [line for line in (told.out, told.err, *lines, str(running)) if PASSWORD in line]
    files = [path for path in running.home.rglob("*") if path.is_file() and path.name != "auth"]
    assert {"prefect.log", "mlflow.log", "prefect.json", "users.db", "mlflow.db"} <= {path.name for path in files}
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]


def test_another_password_than_the_servers_have_is_told(running: Stack) -> None:
    path = write_auth(running.home, f"{USER}:{PASSWORD[::-1]}")
    try:
        with pytest.raises(StackError, match=r"refuses the user and password of the file auth\. Run `relex down`"):
            stack.up(running.home)
        path.unlink()
        with pytest.raises(StackError, match=r"asks for a password and the file auth is gone\. Run `relex down`"):
            stack.up(running.home)
    finally:
        write_auth(running.home, f"{USER}:{PASSWORD}\n")
    assert stack.up(running.home) == running


def test_a_server_that_asks_nobody_is_not_taken_for_one_that_does(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    write_auth(tmp_path, f"{USER}:{PASSWORD}")
    argv = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    found = daemon.start(tmp_path, "prefect", argv, environment=dict(os.environ), url=f"http://127.0.0.1:{port}")
    access = read_access(tmp_path)
    try:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not admits(client, found, PREFECT, None):
                time.sleep(0.05)
            with pytest.raises(
                StackError, match=r"was started before the file auth and asks nobody\. Run `relex down`"
            ):
                admits(client, found, PREFECT, access)
    finally:
        daemon.stop(tmp_path, ["prefect"])


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (f"{USER}:{PASSWORD}", 0o640, r"can be read by others \(mode 640\)\. Run `chmod 600"),
        (PASSWORD, 0o600, "one line, user:password"),
        (f":{PASSWORD}", 0o600, "one line, user:password"),
        (f"{USER}:short", 0o600, "12 characters"),
        (f"{USER}:{PASSWORD}\n{USER}:{PASSWORD}", 0o600, "one line"),
    ],
)
def test_a_file_that_is_not_fit_to_keep_a_password_is_refused_without_it(
    tmp_path: Path, content: str, mode: int, says: str
) -> None:
    write_auth(tmp_path, content, mode=mode)
    with pytest.raises(StackError, match=says) as refusal:
        read_access(tmp_path)
    assert PASSWORD not in str(refusal.value)


def _prefect(running: Stack) -> dict[object, str]:
    environment = stack.environment(running)
    return {
        PREFECT_API_URL: environment["PREFECT_API_URL"],
        PREFECT_API_AUTH_STRING: environment["PREFECT_API_AUTH_STRING"],
    }


def test_a_password_shows_in_no_traceback(tmp_path: Path) -> None:
    write_auth(tmp_path, f"{USER}:{PASSWORD}")
    access = read_access(tmp_path)
    assert PASSWORD not in repr(access)
    assert client_environment(access)["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
    assert client_environment(None) == {}
