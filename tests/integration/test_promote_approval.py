"""Promotion on somebody's word: the real servers, the real process that serves the question, the form's own API."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deploy.local import daemon
from deploy.local.stack import Stack
from flows.errors import PromotionError
from flows.processes import PROMOTER, revive_promoter
from flows.promote.flow import ask
from tests.helpers.registry import BEST, GOOD, Registry


def look(servers: Stack, run: str) -> dict[str, Any]:
    answer: dict[str, Any] = httpx.get(f"{servers.prefect_api_url}/flow_runs/{run}").raise_for_status().json()
    return answer


def resume(servers: Stack, run: str, **form: str) -> None:
    """Answer as the page does."""
    url = f"{servers.prefect_api_url}/flow_runs/{run}/resume"
    assert httpx.post(url, json={"run_input": form}).raise_for_status().json()["status"] == "ACCEPT"


def wait_for(condition: Callable[[], bool], *, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.2)


def answered(servers: Stack, run: str, **form: str) -> str:
    """Answer once the question is there; return the message the flow run ends with."""
    wait_for(lambda: look(servers, run)["state_type"] == "PAUSED")
    resume(servers, run, **form)
    return ended(servers, run)


def ended(servers: Stack, run: str) -> str:
    wait_for(lambda: look(servers, run)["state_type"] in ("COMPLETED", "FAILED", "CRASHED"))
    return str(look(servers, run)["state"]["message"])


@pytest.fixture(autouse=True)
def stopped(servers: Stack) -> Iterator[None]:
    """Talk to the server here; afterwards nobody serves questions."""
    with temporary_settings({PREFECT_API_URL: servers.prefect_api_url}):
        yield
    daemon.stop(servers.home, [PROMOTER])


def test_a_promotion_is_approved_in_the_ui_by_whoever_serves_it_then(servers: Stack, tmp_path: Path) -> None:
    store = Registry(tmp_path, servers.mlflow_url)
    store.add(1, GOOD, name="approved")
    asked = ask(servers, "approved", None, by="ada")
    assert ask(servers, "approved", 1, by="ada") == asked
    wait_for(lambda: look(servers, asked.flow_run_id)["state_type"] == "PAUSED")
    assert store.champion("approved") is None
    # The process that asked is gone; the next `relex up` starts it again.
    daemon.stop(servers.home, [PROMOTER])
    resume(servers, asked.flow_run_id, answer="promote", name="grace")
    revive_promoter(servers)
    assert "promoted by grace in the Prefect UI, asked by ada" in ended(servers, asked.flow_run_id)
    assert store.champion("approved") == 1
    with pytest.raises(PromotionError, match="is the champion already"):
        ask(servers, "approved", None, by="ada")


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
