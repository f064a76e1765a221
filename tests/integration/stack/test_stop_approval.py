"""Stopping the training on somebody's word, with a real Prefect server."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

from deploy.local import stack
from deploy.local.stack import Stack
from deploy.runs import record
from deploy.tracking import connect
from flows import approval
from flows.deployments import stop_deployment
from flows.stop import status
from flows.stop.execute import Stop, read_stop
from flows.stop.flow import CONTINUE, STOP, offer, stop_flow
from flows.stop.status import confirm
from tests.helpers import ROOT
from tests.helpers.processes import kill_with_children
from tests.helpers.questions import look, question, resume, wait_for_state
from tests.helpers.stacks import prefect_settings
from tests.helpers.stopped import COMMAND, configure, decided, recorded, runs
from tests.helpers.straight_run import WriteCheckpoint


@pytest.fixture
def server(servers: Stack) -> Iterator[Stack]:
    """The servers, and this process talking to them."""
    with temporary_settings({**prefect_settings(servers), PREFECT_LOGGING_TO_API_ENABLED: False}):
        yield servers


@pytest.fixture
def ready(config: Path, write_checkpoint: WriteCheckpoint, request: pytest.FixtureRequest) -> Path:
    """The relex.yaml of a decided run with a name of its own and a command that stops it."""
    for step in (0, 10, 20, 25, 40, 60):
        write_checkpoint(step)
    name = re.sub("[^a-z]+", "-", request.node.name)[-40:].strip("-")
    configure(config, training_run=name, stop_command=COMMAND, total_steps=200)
    return config


@contextmanager
def serving(config: Path, server: Stack) -> Iterator[psutil.Popen]:
    """Serve the approval until killed, in a process of its own."""
    environment = {**os.environ, **stack.environment(server), "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "tests.integration.stack.serving_stop", str(config), server.mlflow_url]
    served = psutil.Popen(argv, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert served.stdout.readline() == "cleared\n"
        yield served
    finally:
        kill_with_children(served)
        served.wait(60)


def offer_to_stop(config: Path, server: Stack, **changes: Any) -> str:
    """Decide and offer."""
    return offer(str(config), configure(config), decided(config, **changes), tracking_uri=server.mlflow_url)


def offered(config: Path, server: Stack, **changes: Any) -> tuple[str, str]:
    """Decide and offer; return the sentence and the id of the flow run that it names."""
    # As the extrapolation does: within a flow run of its own.
    sentence = flow(name="decides")(lambda: offer_to_stop(config, server, **changes))()
    match = re.search(r"/runs/flow-run/([0-9a-f-]{36})", sentence)
    assert match is not None
    return sentence, match[1]


def steps_saved(config: Path, server: Stack, stop: Stop) -> float:
    """Return what the decision's run in MLflow says."""
    settings, uri = configure(config), server.mlflow_url
    key = f"{settings.training_run} {stop.decision}"
    run = record(settings.registered_model, tracking_uri=uri, key=key, title="").run_id
    return float(connect(uri).get_run(run).data.metrics["steps_saved"])


def suspend(run: str) -> None:
    """Run a flow run here until it waits for its answer."""
    with pytest.raises(Pause):
        take_up(run)


def take_up(run: str) -> str:
    """Run a flow run here, as its process would; return the message it ends with."""
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(run))
    state: Any = run_flow(stop_flow, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
    return str(state.message)


@pytest.fixture
def deployed(ready: Path, server: Stack) -> Path:
    """The same, its approval deployed; nothing serves it but the test."""
    stop_deployment(ready, configure(ready), tracking_uri=server.mlflow_url).apply()
    return ready


@pytest.mark.slow
def test_an_approved_stop_survives_a_restart_and_happens_once(deployed: Path, server: Stack) -> None:
    sentence, run = offered(deployed, server)
    assert "140 steps are saved" in sentence
    assert offered(deployed, server) == (sentence, run)
    suspend(run)
    assert question(server, run, "schema")["required"] == ["answer"]
    assert runs(deployed) == []
    with serving(deployed, server):
        assert look(server, run)["state_type"] == "PAUSED"
        assert resume(server, run, answer=STOP, name="ada") == "ACCEPT"
        # Approved twice is approved once.
        assert resume(server, run, answer=STOP) == "ABORT"
        wait_for_state(server, run, "COMPLETED", "FAILED", "CRASHED")
    assert look(server, run)["state"]["message"].startswith("The training was stopped at")
    assert len(runs(deployed)) == 1
    stop = read_stop(configure(deployed))
    assert stop is not None
    assert (stop.state, stop.by) == ("stopped", "ada in the Prefect UI")
    assert steps_saved(deployed, server, stop) == 140
    assert offer_to_stop(deployed, server).startswith("The training was stopped at")


def test_the_page_says_what_is_asked(deployed: Path, server: Stack) -> None:
    _, run = offered(deployed, server, reason="it is better: passed.")
    suspend(run)
    text = question(server, run)
    for part in ("it is better: passed.", "140 steps are saved", f"once: run `{COMMAND}` in {deployed.parent}"):
        assert part in text
    assert "open for 30 days, until " in text
    left = datetime.fromisoformat(look(server, run)["state"]["state_details"]["pause_timeout"]) - datetime.now(UTC)
    assert timedelta(days=29, hours=23) < left < timedelta(days=30)


def test_declined_nothing_is_run_and_it_is_on_record(deployed: Path, server: Stack) -> None:
    _, run = offered(deployed, server)
    suspend(run)
    resume(server, run, answer=CONTINUE, name="bob")
    assert take_up(run).startswith("Stopping was declined by bob in the Prefect UI")
    # The same decision is the same question.
    assert offer_to_stop(deployed, server).startswith("Stopping was declined by bob in the Prefect UI")
    assert runs(deployed) == []
    stop = read_stop(configure(deployed))
    assert stop is not None
    assert stop.state == "declined"
    # Somebody may think better of it.
    settings = configure(deployed)
    assert confirm(settings, status.look(deployed, settings), by="ada").state == "stopped"


@pytest.fixture
def minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are open for a moment only."""
    monkeypatch.setattr(approval, "OPEN", timedelta(seconds=1))


@pytest.mark.usefixtures("minute")
def test_a_question_that_nobody_answered_expires_and_an_answer_that_comes_later_does_nothing(
    deployed: Path, server: Stack
) -> None:
    _, run = offered(deployed, server)
    suspend(run)
    wait_for_state(server, run, "FAILED")
    assert resume(server, run, answer=STOP) == "ABORT"
    assert runs(deployed) == []
    sentence = offer_to_stop(deployed, server)
    assert sentence.startswith("Stopping the training was offered and not done: ")
    assert f"`relex stop {deployed} --confirm` does it." in sentence


def test_a_training_that_is_at_its_end_is_not_stopped_on_an_old_question(
    deployed: Path, server: Stack, write_checkpoint: WriteCheckpoint
) -> None:
    _, run = offered(deployed, server)
    suspend(run)
    write_checkpoint(200)
    resume(server, run, answer=STOP)
    assert take_up(run).endswith("step 200 of 200 planned: nothing is left to stop.")
    assert runs(deployed) == []


def test_what_was_stopped_by_hand_meanwhile_is_not_stopped_again(deployed: Path, server: Stack) -> None:
    _, run = offered(deployed, server)
    suspend(run)
    settings = configure(deployed)
    confirm(settings, status.look(deployed, settings), by="ada")
    resume(server, run, answer=STOP)
    assert "was stopped at" in take_up(run)
    assert len(runs(deployed)) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stop_command": "echo something else >> stopped"}, "What was approved is not what"),
        ({"margin": 0.5}, "was decided on other checkpoints or settings"),
    ],
)
def test_what_was_not_shown_is_not_run(deployed: Path, server: Stack, changes: dict[str, Any], says: str) -> None:
    _, run = offered(deployed, server)
    suspend(run)
    configure(deployed, **changes)
    # The extrapolation comes here again when it was killed before its end.
    offer_to_stop(deployed, server)
    resume(server, run, answer=STOP)
    assert says in take_up(run)
    assert runs(deployed) == []


def test_at_once_without_a_record_is_asked_for(deployed: Path, server: Stack) -> None:
    configure(deployed, stop="at-once")
    sentence, _ = offered(deployed, server)
    assert "It is asked for although stop is at-once: the record of finished runs does not speak for it" in sentence
    assert runs(deployed) == []


def test_at_once_nobody_is_asked(deployed: Path, server: Stack) -> None:
    settings = configure(deployed, stop="at-once")
    recorded(settings, 9)
    sentence = offer_to_stop(deployed, server)
    assert "by the setting stop: at-once" in sentence
    assert offer_to_stop(deployed, server) == sentence
    assert len(runs(deployed)) == 1


def test_what_is_not_due_is_not_offered(ready: Path, server: Stack) -> None:
    assert offer_to_stop(ready, server, verdict="keep training") == ""
    assert "Training on may win at most 10.0 points" in offer_to_stop(ready, server, at_least=0.9)
    assert offer_to_stop(ready, server).startswith("Nothing serves the approval of stopping")
    configure(ready, stop_command=None)
    assert "add stop_command or stop_file to" in offer_to_stop(ready, server)
    assert "more than stop_price" in offer_to_stop(ready, server, at_least=0.9)
    assert runs(ready) == []
