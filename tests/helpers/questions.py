"""A question on a page of the Prefect UI, looked at and answered by the form's own API."""

import time
from typing import Any

import httpx

from deploy.local.stack import Stack


def look(server: Stack, run: str) -> dict[str, Any]:
    """Return the flow run that asks."""
    answer: dict[str, Any] = _call("GET", f"{server.prefect_api_url}/flow_runs/{run}")
    return answer


def question(server: Stack, run: str, part: str = "description") -> Any:
    """Return what the page shows: the description, or the schema of its form."""
    keys = look(server, run)["state"]["state_details"]["run_input_keyset"]
    return _call("GET", f"{server.prefect_api_url}/flow_runs/{run}/input/{keys[part]}")


def resume(server: Stack, run: str, **form: str) -> str:
    """Answer as the page does; return what the server makes of it."""
    return str(_call("POST", f"{server.prefect_api_url}/flow_runs/{run}/resume", {"run_input": form})["status"])


def _call(method: str, url: str, body: object = None) -> Any:
    """Ask the server; where its database is busy (503), again, as a person presses the button once more."""
    for _ in range(60):
        # A machine that is busy starting processes is slow to answer.
        response = httpx.request(method, url, json=body, timeout=60)
        if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(0.5)
    return response.raise_for_status().json()


def wait_for_state(server: Stack, run: str, *states: str, seconds: float = 240) -> str:
    """Wait until the flow run is in one of the states, and return the message it has there."""
    end = time.monotonic() + seconds
    while (seen := look(server, run))["state_type"] not in states:
        assert time.monotonic() < end, f"{seen['state_type']} after {seconds:.0f} s, waiting for {states}"
        time.sleep(0.1)
    return str(seen["state"]["message"])
