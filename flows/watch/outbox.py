"""Events that were sent and are not yet known to be in the server's database.

A server that is killed loses what it had not written, a watcher what it had not sent. Kept before the ledger says that
it was announced, an event is sent again until the server shows it; by its id the server keeps it once.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.events.filters import EventFilter, EventIDFilter
from prefect.settings import get_current_settings

from flows.settings import Settings
from flows.state.events import Event
from flows.state.records import write_json

logger = logging.getLogger(__name__)

# The server writes what it received every five seconds.
_AGAIN_SECONDS = 10.0
_PAGE = 50


def keep(settings: Settings, events: Sequence[Event], *, now: float) -> None:
    """Keep events that are sent at time `now`; without a server, nothing is kept."""
    if events and get_current_settings().api.url is not None:
        _write(settings, _read(settings) | {str(item.id): _row(item, sent=now) for item in events})


def due(settings: Settings, *, now: float) -> list[Event]:
    """Return what was sent some time before `now` and the server does not show, to be sent again; drop what it shows.

    Nothing while the server does not answer.
    """
    kept = _read(settings)
    late = {key: row for key, row in kept.items() if now - row["sent"] >= _AGAIN_SECONDS}
    if not late or get_current_settings().api.url is None:
        return []
    try:
        shown = _shown(list(late))
    except httpx.HTTPError as error:
        logger.info("the server does not answer: %s", error)
        return []
    again = {key: {**row, "sent": now} for key, row in late.items() if key not in shown}
    _write(settings, {key: row for key, row in kept.items() if key not in shown} | again)
    return [Event(row["name"], UUID(key), row["resource"], row["payload"]) for key, row in again.items()]


def _shown(keys: Sequence[str]) -> set[str]:
    found: set[str] = set()
    with get_client(sync_client=True) as client:
        for start in range(0, len(keys), _PAGE):
            ids = [UUID(key) for key in keys[start : start + _PAGE]]
            page = client.read_events(EventFilter(id=EventIDFilter(id=ids)), limit=_PAGE)
            found |= {str(item.id) for item in page.events}
    return found


def _row(item: Event, *, sent: float) -> dict[str, Any]:
    return {"name": item.name, "resource": item.resource, "payload": item.payload, "sent": sent}


def _read(settings: Settings) -> dict[str, dict[str, Any]]:
    path = settings.home / "outbox.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_bytes()) if path.is_file() else {}
    return rows


def _write(settings: Settings, rows: dict[str, dict[str, Any]]) -> None:
    write_json(settings.home / "outbox.json", rows)
