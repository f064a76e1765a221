"""Events that were sent and are not yet known to be in the server's database.

A server that is killed loses what it had not written, a watcher what it had not sent. Kept before the ledger says that
it was announced, an event is sent again until the server shows it; by its id the server keeps it once.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventIDFilter
from prefect.settings import get_current_settings

from flows.settings import Settings
from flows.state.events import Event
from flows.state.records import read_json, write_json

logger = logging.getLogger(__name__)

# The server writes what it received every five seconds.
_AGAIN_SECONDS = 10.0
_PAGE = 50


@dataclass(frozen=True)
class _Kept:
    """An event that was sent, last at time `sent` (seconds since the epoch); its id is its key in the file."""

    name: str
    resource: str
    payload: dict[str, Any]
    sent: float


def keep(settings: Settings, events: Sequence[Event], *, now: float) -> None:
    """Keep events that are sent at time `now`; without a server, nothing is kept."""
    if events and get_current_settings().api.url is not None:
        kept = {str(event.id): _Kept(event.name, event.resource, event.payload, now) for event in events}
        _write(settings, _read(settings) | kept)


def due(settings: Settings, *, now: float) -> list[Event]:
    """Return what was sent some time before `now` and the server does not show, to be sent again; drop what it shows.

    Nothing while the server does not answer.
    """
    kept = _read(settings)
    late = {key: event for key, event in kept.items() if now - event.sent >= _AGAIN_SECONDS}
    if not late or get_current_settings().api.url is None:
        return []
    try:
        shown = _shown(list(late))
    except httpx.HTTPError as error:
        logger.info("the server does not answer: %s", error)
        return []
    again = {key: replace(event, sent=now) for key, event in late.items() if key not in shown}
    _write(settings, {key: event for key, event in kept.items() if key not in shown} | again)
    return [Event(event.name, UUID(key), event.resource, event.payload) for key, event in again.items()]


def _shown(keys: Sequence[str]) -> set[str]:
    shown: set[str] = set()
    with get_client(sync_client=True) as client:
        for start in range(0, len(keys), _PAGE):
            ids = [UUID(key) for key in keys[start : start + _PAGE]]
            page = client.read_events(EventFilter(id=EventIDFilter(id=ids)), limit=_PAGE)
            shown |= {str(event.id) for event in page.events}
    return shown


def _read(settings: Settings) -> dict[str, _Kept]:
    path = settings.home / "outbox.json"
    return read_json(path, dict[str, _Kept]) if path.is_file() else {}


def _write(settings: Settings, kept: Mapping[str, _Kept]) -> None:
    write_json(settings.home / "outbox.json", {key: asdict(event) for key, event in kept.items()})
