"""Calls to a server of the stack, as patient as a person."""

import time
from typing import Any

import httpx


def call(method: str, url: str, body: object = None, *, auth: tuple[str, str] | None = None) -> Any:
    """Return the JSON of the answer; where Prefect's database is busy (503), ask again, as a person does."""
    for _ in range(60):
        # A machine that is busy starting processes is slow to answer.
        answer = httpx.request(method, url, json=body, auth=auth, timeout=60, trust_env=False)
        if answer.status_code != httpx.codes.SERVICE_UNAVAILABLE:
            break
        time.sleep(0.5)
    return answer.raise_for_status().json()
