"""Promotion on somebody's word: the real servers, the real process that serves the question, the form's own API."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import temporary_settings

from deploy.local import daemon
from deploy.local.stack import Stack
from deploy.registry import CHAMPION
from deploy.tracking import connect
from deploy.wishes import ANSWER
from flows.errors import PromotionError
from flows.processes import PROMOTER, spawn_promoter
from flows.promote.ask import ask
from tests.helpers.questions import question, resume, wait_for_state
from tests.helpers.registry import BEST, GOOD, Registry
from tests.helpers.stacks import prefect_settings
from tests.helpers.waiting import wait_for


def answered(servers: Stack, run: str, **form: str) -> str:
    """Answer once the question is there; return the message the flow run ends with."""
    wait_for_state(servers, run, "PAUSED")
    assert resume(servers, run, **form) == "ACCEPT"
    return ended(servers, run)


def ended(servers: Stack, run: str) -> str:
    return wait_for_state(servers, run, "COMPLETED", "FAILED", "CRASHED")


@pytest.fixture(autouse=True)
def stopped(servers: Stack) -> Iterator[None]:
    """Talk to the server here; afterwards nobody serves questions."""
    with temporary_settings(prefect_settings(servers)):
        yield
    daemon.stop(servers.home, [PROMOTER])


@pytest.mark.slow
def test_a_promotion_is_approved_in_the_ui_by_whoever_serves_it_then(servers: Stack, tmp_path: Path) -> None:
    store = Registry(tmp_path, servers.mlflow_url)
    store.add(1, GOOD, name="approved")
    asked = ask(servers, "approved", None, by="ada")
    assert ask(servers, "approved", 1, by="ada") == asked
    wait_for_state(servers, asked.flow_run_id, "PAUSED")
    page = question(servers, asked.flow_run_id)
    assert "**Make approved-candidates version 1 the champion?** ada asks." in page
    assert "open for 30 days, until " in page
    assert question(servers, asked.flow_run_id, "schema")["required"] == ["answer"]
    assert store.champion("approved") is None
    # The process that asked is gone; the next `relex up` starts it again.
    daemon.stop(servers.home, [PROMOTER])
    assert resume(servers, asked.flow_run_id, answer="promote", name="grace") == "ACCEPT"
    spawn_promoter(servers)
    assert "promoted by grace in the Prefect UI, asked by ada" in ended(servers, asked.flow_run_id)
    assert store.champion("approved") == 1
    with pytest.raises(PromotionError, match="is the champion already"):
        ask(servers, "approved", None, by="ada")


@pytest.mark.slow
def test_an_alias_set_in_mlflow_is_judged_by_the_process_that_relex_up_starts(servers: Stack, tmp_path: Path) -> None:
    store = Registry(tmp_path, servers.mlflow_url)
    store.add(1, GOOD, name="pressed")
    spawn_promoter(servers)
    client = connect(servers.mlflow_url)
    client.set_registered_model_alias("pressed-candidates", CHAMPION, "1")
    wait_for("the champion", lambda: store.champion("pressed") == 1)
    wait_for("the answer", lambda: ANSWER in client.get_model_version("pressed-candidates", "1").tags)
    log = servers.home / "logs" / f"{PROMOTER}.log"
    said = "pressed-candidates version 1, set in MLflow, stands: pressed version 1 is the champion"
    wait_for("its line in the log", lambda: said in log.read_text())


@pytest.mark.slow
def test_declined_nothing_is_promoted_and_who_asks_again_is_asked_again(servers: Stack, tmp_path: Path) -> None:
    store = Registry(tmp_path, servers.mlflow_url)
    store.add(1, GOOD, name="declined")
    asked = ask(servers, "declined", 1, by="ada").flow_run_id
    told = answered(servers, asked, answer="do not promote", name="grace")
    assert told == "Not promoted, says grace in the Prefect UI."
    assert store.champion("declined") is None
    assert ask(servers, "declined", 1, by="ada").flow_run_id != asked
    # What would be refused is not asked.
    store.add(2, BEST, name="declined")
    store.promote(2, name="declined")
    with pytest.raises(PromotionError, match="would not be promoted"):
        ask(servers, "declined", 1, by="ada")
