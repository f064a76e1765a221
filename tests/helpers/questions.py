"""A question on a page of the Prefect UI, looked at and answered by the form's own API."""

import time
from typing import Any

from deploy.local.stack import Stack
from tests.helpers.api import call
from tests.helpers.stacks import auth


def look(server: Stack, run: str) -> dict[str, Any]:
    """Return the flow run that asks."""
    answer: dict[str, Any] = call("GET", f"{server.prefect_api_url}/flow_runs/{run}", auth=auth(server))
    return answer


def question(server: Stack, run: str, part: str = "description") -> Any:
    """Return what the page shows: the description, or the schema of its form."""
    keys = look(server, run)["state"]["state_details"]["run_input_keyset"]
    return call("GET", f"{server.prefect_api_url}/flow_runs/{run}/input/{keys[part]}", auth=auth(server))


def resume(server: Stack, run: str, **form: str) -> str:
    """Answer as the page does; return what the server makes of it."""
    url = f"{server.prefect_api_url}/flow_runs/{run}/resume"
    return str(call("POST", url, {"run_input": form}, auth=auth(server))["status"])


def wait_for_state(server: Stack, run: str, *states: str, seconds: float = 240) -> str:
    """Wait until the flow run is in one of the states, and return the message it has there."""
    end = time.monotonic() + seconds
    while (seen := look(server, run))["state_type"] not in states:
        assert time.monotonic() < end, f"{seen['state_type']} after {seconds:.0f} s, waiting for {states}"
        time.sleep(0.1)
    return str(seen["state"]["message"])
