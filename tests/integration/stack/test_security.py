"""Who is let in: nobody without the password, from another site's page, or by another name, and no other user."""

import asyncio
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.events import get_events_subscriber
from prefect.settings import temporary_settings
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from deploy.errors import StackError
from deploy.local import daemon, stack
from deploy.local.access import (
    ENTRANCE,
    OPEN,
    access_file,
    client_environment,
    close_files,
    close_home,
    make_access,
    read_access,
)
from deploy.local.port import free_port
from deploy.local.server import PREFECT, admits
from deploy.local.stack import Stack
from deploy.registry import models
from deploy.runs import record
from flows.cli import main, operate
from tests.helpers.api import call
from tests.helpers.processes import command_of
from tests.helpers.stacks import access, auth, headers, prefect_settings
from tests.helpers.waiting import wait_for

USER, PASSWORD = "somebody", "no-one-may-read-this"

# What a browser sends for a page of another site, of another server on this machine, or of no site it would name.
FOREIGN: dict[str, Mapping[str, str]] = {
    "by a name that was made to lead here": {"Host": "attack.example:4200", "Origin": "http://attack.example:4200"},
    "by such a name, without an origin": {"Host": "attack.example"},
    "by the name of the machine": {"Host": "localhost"},
    "from another site": {"Origin": "http://attack.example"},
    "from another server of this machine": {"Origin": "http://127.0.0.1:9"},
    "from a file or a sandbox": {"Origin": "null"},
    "from another site's form": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
    "into another site's frame": {
        **{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
        "Sec-Fetch-Dest": "iframe",
    },
    "from another port": {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"},
}


def write_auth(home: Path, content: str, *, mode: int = 0o600) -> Path:
    path = home / "auth"
    path.write_text(content)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def deployment(servers: Stack) -> str:
    """A deployment as those of a training run: whoever changes its pull steps, runs commands."""
    flow = _ask(servers, "flows/", {"name": f"attacked-{uuid4()}"})
    return str(_ask(servers, "deployments/", {"name": "attacked", "flow_id": flow["id"]})["id"])


def _ask(servers: Stack, path: str, body: object = None) -> Any:
    url = f"{servers.prefect_api_url}/{path}"
    return call("GET" if body is None else "POST", url, body, auth=auth(servers))


@pytest.mark.parametrize("way", FOREIGN)
def test_a_page_of_somebody_else_changes_nothing(servers: Stack, deployment: str, way: str) -> None:
    """Also where the browser knows the password, as after a visit of the pages."""
    attack = {"pull_steps": [{"prefect.deployments.steps.run_shell_script": {"script": "touch /tmp/attacked"}}]}
    experiment = f"attacked {uuid4()}"
    for known in ({}, headers(servers)):
        sent = {**known, **FOREIGN[way]}
        with httpx.Client(headers=sent, trust_env=False, timeout=60) as client:
            prefect = servers.prefect_api_url
            answers = [
                client.patch(f"{prefect}/deployments/{deployment}", json=attack),
                client.post(f"{prefect}/deployments/{deployment}/create_flow_run", json={}),
                client.get(f"{prefect}/health"),
                client.get(f"{servers.prefect_url}/ui-settings"),
                client.post(f"{servers.mlflow_url}/api/2.0/mlflow/experiments/create", json={"name": experiment}),
                client.get(f"{servers.mlflow_url}/version"),
            ]
        assert [answer.status_code for answer in answers] == [403] * len(answers)
        assert "of its own only" in answers[0].text or "answers to no other name" in answers[0].text
    assert _ask(servers, f"deployments/{deployment}")["pull_steps"] == []
    runs = {"deployments": {"id": {"any_": [deployment]}}}
    assert _ask(servers, "flow_runs/filter", runs) == []
    response = httpx.get(
        f"{servers.mlflow_url}/api/2.0/mlflow/experiments/get-by-name",
        params={"experiment_name": experiment},
        headers=headers(servers),
        trust_env=False,
    )
    assert response.status_code == 404


@pytest.mark.parametrize("server", ["prefect_api_url", "mlflow_url"])
def test_another_origin_is_told_to_stay_away_before_it_asks(servers: Stack, server: str) -> None:
    asks = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin in ("http://attack.example", "http://127.0.0.1:9"):
        answer = httpx.options(
            f"{getattr(servers, server)}/version", headers={**asks, "Origin": origin}, trust_env=False
        )
        assert answer.status_code == 403
        assert "Access-Control-Allow-Origin" not in answer.headers


def test_a_request_without_the_password_is_refused_by_both(servers: Stack) -> None:
    prefect, mlflow = servers.prefect_api_url, servers.mlflow_url
    protected = [
        *(f"{prefect}/{path}" for path in ("admin/version", "health", "ready", "docs")),
        *(f"{servers.prefect_url}{path}" for path in ("", "/ui-settings", "/v2/dashboard")),
        *(f"{mlflow}{path}" for path in ("", "/health", "/version", "/get-artifact?path=a&run_uuid=b", "/graphql")),
        f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=1",
    ]
    wrong: tuple[Mapping[str, str], ...] = ({}, {"Authorization": "Basic"}, {"Authorization": f"Basic {'A' * 40}"})
    with httpx.Client(trust_env=False, timeout=60) as client:
        for given in wrong:
            answers = {url: client.get(url, headers=given) for url in protected}
            assert {url: answer.status_code for url, answer in answers.items()} == dict.fromkeys(protected, 401)
            assert all(answer.headers["WWW-Authenticate"].startswith("Basic ") for answer in answers.values())
        for url in (protected[0], protected[-1]):
            assert client.get(url, headers=headers(servers)).status_code == 200


@pytest.mark.parametrize("path", ["/events/in", "/events/out", "/logs/out", "/task_runs/subscriptions/scheduled"])
def test_no_websocket_opens_for_somebody_else(servers: Stack, path: str) -> None:
    url = f"{servers.prefect_api_url}{path}".replace("http", "ws", 1)
    known = headers(servers)
    ways = [
        ({}, 401),
        ({"Authorization": "Basic AAAA"}, 401),
        ({"Origin": "http://attack.example"}, 403),
        ({**known, "Origin": "http://attack.example"}, 403),
        ({**known, "Origin": "http://127.0.0.1:9"}, 403),
        ({**known, "Sec-Fetch-Site": "cross-site"}, 403),
    ]

    async def attempt(given: Mapping[str, str]) -> int:
        try:
            async with connect(url, additional_headers=given, subprotocols=["prefect"], proxy=None):  # type: ignore[list-item]
                return 101
        except InvalidStatus as refusal:
            return refusal.response.status_code

    assert [asyncio.run(attempt(given)) for given, _ in ways] == [status for _, status in ways]
    assert asyncio.run(attempt(known)) == 101


def test_what_is_ours_is_let_in(servers: Stack) -> None:
    uri = stack.tracking_uri(servers.home)
    made = record("closed", tracking_uri=uri, key="once", title="with a password")
    assert access(servers).password not in str(made.url)
    assert models("closed", tracking_uri=uri) == []

    async def subscribe() -> None:
        async with get_events_subscriber():
            pass

    with temporary_settings(dict(prefect_settings(servers))):
        with get_client(sync_client=True) as client:
            client.read_flows()
        asyncio.run(subscribe())


def test_an_address_with_the_password_opens_a_page_whose_address_has_none(
    servers: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """A page at an address with a password in it may fetch nothing, in a browser."""
    told = stack.how_to_enter_first(servers.home)
    for url in (servers.prefect_url, servers.mlflow_url):
        address = next(word for word in told.split() if word.endswith(f"{url.removeprefix('http://')}{ENTRANCE}"))
        entered = httpx.get(address, trust_env=False, timeout=60)
        assert (entered.status_code, entered.headers["Location"]) == (303, f"{url}/")
        page = httpx.get(f"{url}/", headers=headers(servers), follow_redirects=True, trust_env=False, timeout=60)
        assert "<html" in page.text.lower()
    settings = httpx.get(
        f"{servers.prefect_url}/ui-settings", headers=headers(servers), trust_env=False, timeout=60
    ).json()
    assert (settings["api_url"], settings["auth"]) == (servers.prefect_api_url, None)
    assert access(servers).password not in stack.how_to_enter(servers.home)
    operate._show_entry(servers.home, known=False)
    assert [line.partition(":")[0].strip() for line in capsys.readouterr().out.splitlines() if "/enter" in line] == [
        "Prefect",
        "MLflow",
    ]


def test_a_link_on_another_site_may_be_followed(servers: Stack) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    for url in (servers.prefect_url, servers.mlflow_url):
        opened = httpx.get(
            f"{url}/", headers={**headers(servers), **link}, follow_redirects=True, trust_env=False, timeout=60
        )
        assert opened.status_code == 200


@pytest.mark.parametrize("name", ["prefect", "mlflow"])
def test_a_server_listens_on_the_loopback_interface_only(servers: Stack, name: str) -> None:
    addresses = {
        connection.laddr.ip
        for process in daemon.processes(servers.home, name)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert addresses == {"127.0.0.1"}


def test_the_home_is_its_users_alone(servers: Stack) -> None:
    """Artifacts have the modes of the files they are links of, in a directory that nobody else enters."""
    artifacts = servers.home / "mlflow/artifacts"
    stack.spawn(servers.home, "sleeper", ["sleep", "1000"])
    daemon.stop(servers.home, ["sleeper"])
    paths = [servers.home, *(path for path in servers.home.rglob("*") if artifacts not in path.parents)]
    modes = {str(path): path.stat().st_mode & 0o777 for path in paths if not path.name.endswith(("-wal", "-shm"))}
    assert {path: oct(mode) for path, mode in modes.items() if mode & 0o077} == {}
    assert {"prefect.db", "mlflow.db", "prefect.log", "mlflow.log", "auth"} <= {path.name for path in paths}


def test_what_an_earlier_version_left_open_is_closed(tmp_path: Path) -> None:
    home, outside, kept = tmp_path / "home", tmp_path / "outside", tmp_path / "home/mlflow/artifacts/weights"
    outside.mkdir()
    for path in (home / "services/old.json", outside / "file", kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    (home / "link").symlink_to(outside)
    for path in (tmp_path, *tmp_path.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    close_home(home)
    close_files(home)
    modes = {str(path.relative_to(tmp_path)): path.lstat().st_mode & 0o777 for path in tmp_path.rglob("*")}
    assert {path for path, mode in modes.items() if mode & 0o077} == {
        *("outside", "outside/file", "home/link", "home/mlflow/artifacts/weights"),
    }


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_users_home_is_refused(tmp_path: Path) -> None:
    os.chown(tmp_path, 65534, 65534)
    with pytest.raises(StackError, match=r"belongs to another user\. Give --home a directory of your own"):
        stack.up(tmp_path)


def test_the_password_is_in_no_file_command_line_or_status(
    servers: Stack, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for arguments in (["status"], ["status", "--json"], ["up"], ["up", "--json"], ["models", "closed", "--json"]):
        monkeypatch.setattr(sys, "argv", ["relex", *arguments, "--home", str(servers.home)])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert not end.value.code
    told = capsys.readouterr()
    assert "prefect" in told.out
    assert f"ask for the user and the password in {servers.home / 'auth'}." in told.out
    processes = [process for name in ("prefect", "mlflow") for process in daemon.processes(servers.home, name)]
    assert len(processes) >= 2
    lines = [" ".join(command_of(process)) for process in processes]
    known = access(servers)
    secrets = (known.password, known.authorization.removeprefix("Basic "))
    assert not [line for line in (told.out, told.err, *lines, str(servers)) for secret in secrets if secret in line]
    files = [path for path in servers.home.rglob("*") if path.is_file() and path.name != "auth"]
    assert {"prefect.log", "mlflow.log", "prefect.json", "mlflow.db"} <= {path.name for path in files}
    assert not [path for path in files for secret in secrets if secret.encode() in path.read_bytes()]


def test_another_password_than_the_servers_have_is_told(servers: Stack) -> None:
    path = access_file(servers.home)
    kept = path.read_text()
    try:
        write_auth(servers.home, f"{USER}:{PASSWORD}")
        with pytest.raises(StackError, match=r"refuses the user and password of the file auth\. Run `relex down`"):
            stack.up(servers.home)
        write_auth(servers.home, OPEN)
        with pytest.raises(StackError, match=r"asks for a password and the file auth says none\. Run `relex down`"):
            stack.up(servers.home)
        path.unlink()
        with pytest.raises(StackError, match=r"auth, which says who may use it, is gone\. Run `relex down`"):
            stack.up(servers.home)
        assert not path.exists()
    finally:
        write_auth(servers.home, kept)
    assert stack.up(servers.home) == servers


def test_a_server_that_asks_nobody_is_not_taken_for_one_that_does(tmp_path: Path) -> None:
    port = free_port()
    write_auth(tmp_path, f"{USER}:{PASSWORD}")
    argv = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    service = daemon.start(tmp_path, "prefect", argv, environment=dict(os.environ), url=f"http://127.0.0.1:{port}")
    try:
        with httpx.Client(trust_env=False, timeout=60) as client:
            wait_for("the server", lambda: admits(client, service, PREFECT, None))
            with pytest.raises(StackError, match=r"asks nobody and the file auth has a password\. Run `relex down`"):
                admits(client, service, PREFECT, read_access(tmp_path))
        with pytest.raises(StackError, match=r"started by another version of relex, and may let anyone in\. Run"):
            stack.up(tmp_path)
    finally:
        daemon.stop(tmp_path, ["prefect"])


def test_a_password_is_made_once_and_for_its_user_only(tmp_path: Path) -> None:
    assert not stack.has_access(tmp_path)
    make_access(tmp_path)
    made = read_access(tmp_path)
    assert made is not None
    assert made.user == "relex"
    assert len(made.password) >= 32
    assert access_file(tmp_path).stat().st_mode & 0o777 == 0o600
    make_access(tmp_path)
    assert read_access(tmp_path) == made
    assert [path.name for path in tmp_path.iterdir()] == ["auth"]


def test_a_stack_is_open_only_where_its_user_wrote_what_that_means(tmp_path: Path) -> None:
    write_auth(tmp_path, f"{OPEN}\n")
    make_access(tmp_path)
    assert read_access(tmp_path) is None
    assert "anyone on this machine may run commands as me" in access_file(tmp_path).read_text()
    assert client_environment(read_access(tmp_path)) == {}
    write_auth(tmp_path, "open\n")
    with pytest.raises(StackError, match="must hold one line, user:password"):
        read_access(tmp_path)


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (f"{USER}:{PASSWORD}", 0o640, r"can be read by others \(mode 640\)\. Run `chmod 600"),
        (PASSWORD, 0o600, "one line, user:password"),
        (f":{PASSWORD}", 0o600, "one line, user:password"),
        (f"{USER}:short", 0o600, "12 of password"),
        (f"{USER}:{PASSWORD}\n{USER}:{PASSWORD}", 0o600, "one line"),
        (f"{USER}:{PASSWORD}é", 0o600, "ASCII characters"),
        ("", 0o600, "one line, user:password"),
    ],
)
def test_a_file_that_is_not_fit_to_keep_a_password_is_refused_without_it(
    tmp_path: Path, content: str, mode: int, says: str
) -> None:
    write_auth(tmp_path, content, mode=mode)
    with pytest.raises(StackError, match=says) as refusal:
        read_access(tmp_path)
    assert PASSWORD not in str(refusal.value)


def test_a_password_shows_in_no_traceback(tmp_path: Path) -> None:
    write_auth(tmp_path, f"{USER}:{PASSWORD}")
    credentials = read_access(tmp_path)
    assert PASSWORD not in repr(credentials)
    assert client_environment(credentials)["MLFLOW_TRACKING_PASSWORD"] == PASSWORD
    assert client_environment(None) == {}
