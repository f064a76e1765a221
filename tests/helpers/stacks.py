"""How a test talks to a stack that asks for its password."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_CUSTOM_HEADERS

from deploy.local.access import Access, read_access
from deploy.local.stack import Stack

_ENTRY = ("PREFECT_CLIENT_CUSTOM_HEADERS", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


@contextmanager
def environment_given_back() -> Iterator[None]:
    """What a stack puts into the environment of this process is for no other."""
    before = {name: os.environ.get(name) for name in _ENTRY}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def access(server: Stack) -> Access:
    credentials = read_access(server.home)
    assert credentials is not None
    return credentials


def headers(server: Stack) -> dict[str, str]:
    """Return what a request brings to be let in."""
    return {"Authorization": access(server).authorization}


def auth(server: Stack) -> tuple[str, str]:
    """Return the user and password that let a request in."""
    return access(server).user, access(server).password


def prefect_settings(server: Stack) -> Mapping[Any, Any]:
    """Return the settings with which this process talks to the server of a stack."""
    return {PREFECT_API_URL: server.prefect_api_url, PREFECT_CLIENT_CUSTOM_HEADERS: headers(server)}
