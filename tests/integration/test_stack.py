import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.errors import StackError
from deploy.local import daemon, stack
from deploy.local.access import make_access
from deploy.local.server import MLFLOW, is_outdated, launch, still_starting
from deploy.local.stack import Daemon, Stack
from deploy.registry import models
from deploy.runs import record
from evaluation.benchmarks.benchmark import write_benchmark
from flows.cli import main
from flows.processes import revive_watchers, spawn_watcher
from tests.helpers.api import call
from tests.helpers.stacks import auth, environment_given_back
from tests.helpers.waiting import wait_for

UP = """
import sys
from pathlib import Path
from deploy.local import stack
sys.stdout.write(str(stack.up(Path(sys.argv[1]))))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A stack that two processes started at once, on a machine where a stranger has Prefect's port."""
    home = tmp_path_factory.mktemp("stack")
    with contextlib.ExitStack() as held:
        # Where the port is taken already, the stranger is somebody else.
        with contextlib.suppress(OSError):
            held.enter_context(socket.create_server(("127.0.0.1", 4200)))
        starters = [
            subprocess.Popen([sys.executable, "-c", UP, str(home)], stdout=subprocess.PIPE, text=True) for _ in range(2)
        ]
        held.callback(stack.down, home)
        told = {starter.communicate(timeout=300)[0] for starter in starters}
        assert len(told) == 1
        assert ":4200" not in told.pop()
        held.enter_context(environment_given_back())
        yield home


@pytest.fixture
def running(home: Path) -> Stack:
    return stack.up(home)


def test_the_pages_ask_their_own_server(running: Stack) -> None:
    """On the default port they do by themselves; here a stranger has that."""
    settings = call("GET", f"{running.prefect_url}/ui-settings", auth=auth(running))
    assert settings["api_url"] == running.prefect_api_url


@pytest.fixture
def quiet(tmp_path: Path) -> Iterator[Path]:
    """A home without servers."""
    yield tmp_path
    stack.down(tmp_path)


def _pids(home: Path) -> dict[str, int | None]:
    return {service.name: service.pid for service in stack.status(home)}


def test_up_twice_is_one_set_of_servers(running: Stack) -> None:
    before = _pids(running.home)
    assert stack.up(running.home) == running
    assert _pids(running.home) == before
    assert stack.running(running.home) == running


def test_both_pages_are_there(running: Stack) -> None:
    for url in (running.prefect_url, running.mlflow_url):
        page = httpx.get(url, auth=auth(running), follow_redirects=True, trust_env=False, timeout=60)
        assert page.status_code == 200
        assert "<html" in page.text.lower()


def test_the_mlflow_page_shows_what_was_recorded(running: Stack, tmp_path: Path) -> None:
    decision = tmp_path / "decision.json"
    decision.write_text('{"verdict": "refused"}')
    uri = stack.tracking_uri(running.home)
    assert uri == running.mlflow_url
    run = record("tiny", tracking_uri=uri, key="refusal", title="step 240", artifacts=[decision])
    query = "path=decision.json&run_uuid=" + run.run_id
    shown = call("GET", f"{running.mlflow_url}/get-artifact?{query}", auth=auth(running))
    assert shown == {"verdict": "refused"}


def test_a_child_with_the_stacks_environment_talks_to_its_prefect(running: Stack) -> None:
    program = (
        "import sys; from prefect.client.orchestration import get_client\n"
        "client = get_client(sync_client=True); assert client.api_healthcheck() is None\n"
        "sys.stdout.write(str(client.api_url))"
    )
    child = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **stack.environment(running)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert child.stdout.rstrip("/") == running.prefect_api_url


def test_a_killed_server_is_started_again_at_its_address_with_its_data(running: Stack) -> None:
    kept = record("kept", tracking_uri=running.mlflow_url, key="before", title="before the kill")
    before = _pids(running.home)
    assert before["mlflow"] is not None
    left = daemon.processes(running.home, "mlflow")
    os.kill(before["mlflow"], signal.SIGKILL)
    wait_for(
        "the dead server", lambda: {service.state for service in stack.status(running.home)} == {"running", "dead"}
    )
    with pytest.raises(StackError, match="mlflow is dead"):
        stack.running(running.home)
    assert stack.up(running.home) == running
    after = _pids(running.home)
    assert after["prefect"] == before["prefect"]
    assert after["mlflow"] not in {process.pid for process in left}
    assert not any(process.is_running() for process in left)
    assert record("kept", tracking_uri=running.mlflow_url, key="before", title="") == kept


def test_down_leaves_no_process_and_up_finds_the_data_again(running: Stack) -> None:
    kept = record("down", tracking_uri=running.mlflow_url, key="before", title="before down")
    stack.spawn(running.home, "sleeper", ["sleep", "1000"])
    everything = [p for name in _pids(running.home) for p in daemon.processes(running.home, name)]
    assert len(everything) >= 3
    stopped = stack.down(running.home)
    assert {service.state for service in stopped} == {"stopped"}
    assert not any(process.is_running() for process in everything)
    assert stack.tracking_uri(running.home).startswith("sqlite:////")
    assert models("down", tracking_uri=stack.tracking_uri(running.home)) == []
    assert stack.up(running.home).mlflow_url == running.mlflow_url
    assert record("down", tracking_uri=running.mlflow_url, key="before", title="") == kept


def test_a_server_that_ends_at_once_is_reported_with_its_log(quiet: Path) -> None:
    make_access(quiet)
    (quiet / "mlflow").mkdir()
    (quiet / "mlflow/mlflow.db").write_text("not a database")
    service = launch(quiet, MLFLOW)
    with pytest.raises(StackError) as refusal:  # noqa: PT012 the loop is what `up` does
        while True:
            service = still_starting(quiet, service, MLFLOW, seconds=0, limit=120)
            time.sleep(0.1)
    assert "mlflow ended: " in str(refusal.value)
    assert str(quiet / "logs/mlflow.log") in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_server_that_never_answers_is_given_up_and_stopped(quiet: Path) -> None:
    service = daemon.start(quiet, "mlflow", ["sleep", "1000"], environment={}, url="http://127.0.0.1:9")
    assert still_starting(quiet, service, MLFLOW, seconds=119, limit=120) == service
    with pytest.raises(StackError, match="mlflow did not answer within 120 s: it wrote nothing"):
        still_starting(quiet, service, MLFLOW, seconds=121, limit=120)
    assert daemon.processes(quiet, "mlflow") == []


def test_a_server_of_another_version_is_outdated(quiet: Path) -> None:
    (quiet / "version").write_text("0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    argv = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(quiet)]
    service = daemon.start(quiet, "mlflow", argv, environment=dict(os.environ), url=url)
    with httpx.Client(trust_env=False, timeout=60) as client:
        assert not is_outdated(
            client, Daemon("mlflow", None, "http://127.0.0.1:9", "running", quiet, ("mlflow",)), MLFLOW, None
        )
        wait_for("the answer of another version", lambda: is_outdated(client, service, MLFLOW, None))


def test_spawning_a_live_name_again_leaves_it_alone_and_refuses_to_make_it_something_else(quiet: Path) -> None:
    first = stack.spawn(quiet, "sleeper", ["sleep", "1000"])
    assert stack.spawn(quiet, "sleeper", ["sleep", "1000"]) == first
    with pytest.raises(StackError, match=r"sleeper is running as `sleep 1000` and was asked for as `sleep 2000`"):
        stack.spawn(quiet, "sleeper", ["sleep", "2000"])
    os.kill(int(first.pid or 0), signal.SIGKILL)
    wait_for("the end of the process", lambda: stack.status(quiet)[0].state == "dead")
    again = stack.spawn(quiet, "sleeper", ["sleep", "1000"])
    assert (again.state, again.pid == first.pid) == ("running", False)


def test_watchers_that_died_are_started_again_and_those_that_were_stopped_are_not(quiet: Path) -> None:
    running = Stack(quiet, "http://127.0.0.1:9", "http://127.0.0.1:9/api", "http://127.0.0.1:9")
    stopped, killed, live = (spawn_watcher(running, name, quiet / f"{name}.yaml") for name in ("a", "b", "c"))
    daemon.stop(quiet, [stopped.name])
    os.kill(int(killed.pid or 0), signal.SIGKILL)
    # Before it finds that there is no such config.
    os.kill(int(live.pid or 0), signal.SIGSTOP)
    wait_for(
        "the dead watcher", lambda: [service.state for service in stack.status(quiet)] == ["stopped", "dead", "running"]
    )
    (revived,) = revive_watchers(running)
    assert (revived.name, revived.argv, revived.pid == killed.pid) == (killed.name, killed.argv, False)
    assert revived.argv[3] == str(quiet / "b.yaml")
    assert [service.pid for service in stack.status(quiet)][2] == live.pid
    os.kill(int(live.pid or 0), signal.SIGCONT)


def test_two_configs_of_one_training_run_are_refused_before_anything_starts(
    quiet: Path, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("selection", "gate"):
        write_benchmark(config.parent, split, [{"prompt": f"{split} =", "answer": "1"}], max_new_tokens=1)
    other = config.with_name("other.yaml")
    other.write_text(config.read_text())
    monkeypatch.setattr(sys, "argv", ["relex", "up", str(config), str(other), "--home", str(quiet / "home")])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == 1
    assert f"{config} and {other} both describe training run tiny. Give one of them" in capsys.readouterr().err
    assert not (quiet / "home").exists()


def test_a_spawned_process_has_its_environment_and_hears_an_interrupt(quiet: Path) -> None:
    program = (
        "import os, signal, sys, time; print(os.environ['COLOUR'], signal.getsignal(signal.SIGINT), flush=True)\n"
        "time.sleep(1000)"
    )
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        service = stack.spawn(quiet, "child", [sys.executable, "-c", program], environment={"COLOUR": "green"})
    finally:
        signal.signal(signal.SIGINT, before)
    wait_for("the first line", lambda: "green" in service.log.read_text())
    assert "default_int_handler" in service.log.read_text()


def test_down_ends_even_a_grandchild_that_ignores_it(quiet: Path) -> None:
    ignore = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    deaf = f"{ignore}; print('deaf', flush=True); time.sleep(1000)"
    # In a session of its own, as a training run is that a flow started.
    born = f"subprocess.Popen([sys.executable, '-c', {deaf!r}], start_new_session=True)"
    program = f"import subprocess, sys, time; {born}; time.sleep(1000)"
    service = stack.spawn(quiet, "parent", [sys.executable, "-c", program])
    wait_for("the first line", lambda: "deaf" in service.log.read_text())
    family = daemon.processes(quiet, "parent")
    assert len(family) == 2
    stack.down(quiet)
    assert not any(process.is_running() for process in family)


def test_a_process_that_got_the_pid_of_a_dead_service_is_not_stopped(quiet: Path) -> None:
    service = stack.spawn(quiet, "sleeper", ["sleep", "1000"])
    record_path = quiet / "services/sleeper.json"
    recorded = json.loads(record_path.read_text())
    record_path.write_text(json.dumps({**recorded, "create_time": recorded["create_time"] - 60}))
    innocent = psutil.Process(int(service.pid or 0))
    try:
        assert [known.state for known in stack.status(quiet)] == ["dead"]
        stack.down(quiet)
        assert innocent.is_running()
        assert innocent.status() != psutil.STATUS_ZOMBIE
    finally:
        innocent.kill()


@pytest.mark.parametrize(
    ("name", "program", "says"),
    [("../outside", "sleep", "is no name for a background process"), ("ghost", "no-such-program", "is not a program")],
)
def test_what_cannot_be_spawned_is_refused(quiet: Path, name: str, program: str, says: str) -> None:
    with pytest.raises(StackError, match=says):
        stack.spawn(quiet, name, [program])
    assert stack.status(quiet) == []


def test_a_home_where_nothing_runs_says_how_to_start_it(quiet: Path) -> None:
    with pytest.raises(StackError, match=r"prefect was never started in .* Start the stack with `relex up`"):
        stack.running(quiet)
