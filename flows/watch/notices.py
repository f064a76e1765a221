"""Notices: what was decided, failed, drifted, overtaken or stopped is told to the addresses of `notify`, once each.

What there is to tell is read from the state directory, and what was told is kept there: a watcher that is killed tells
nothing twice but what it was telling then. A thread sends; a receiver that does not answer delays nothing else.
"""

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from flows.drift.record import Compared, read_compared
from flows.settings import Settings
from flows.state.failure import read_failures
from flows.state.records import read_json, write_json
from flows.state.scored import Scored, read_scored
from flows.state.windows import read_decisions
from flows.stop.execute import read_stop

if TYPE_CHECKING:
    from apprise import NotifyBase

# After a message that was not taken: the pause doubles from the first to the longest, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 5.0, 600.0

_NEWS = {
    "registered": "registered {}",
    "refused": "refused by a guard, keep training",
    "not shown": "a guard is not shown to hold, keep training",
    "keep training": "refused, keep training",
}

Told = dict[str, list[str]]


@dataclass(frozen=True)
class Notice:
    """One message; `key` names what it is about."""

    key: str
    title: str
    text: str


class Notices:
    """What is to be told about one training run, and the thread that tells it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._thread: threading.Thread | None = None
        self._taken: list[tuple[str, str]] = []
        self._refused: dict[str, str] = {}
        self._pause = FIRST_PAUSE
        self._again = 0.0

    def look(self) -> list[str]:
        """Keep what was told since the last look, have what is due told, and return what an address refuses."""
        addresses = self._settings.notify
        if not addresses:
            return []
        notices = list(due(self._settings))
        path = _path(self._settings)
        before = read_json(path, Told) if path.is_file() else {}
        # To an address that is new, what is there already is no news.
        sent_keys = {_name(address): [each.key for each in notices] for address in addresses} | before
        sending = self._thread is not None and self._thread.is_alive()
        if not sending:
            for name, key in self._taken:
                sent_keys[name] = [*sent_keys[name], key]
            self._taken = []
        if sent_keys != before:
            write_json(path, sent_keys)
        left = [
            (each, address) for each in notices for address in addresses if each.key not in sent_keys[_name(address)]
        ]
        if left and not sending and time.monotonic() >= self._again:
            self._thread = threading.Thread(target=self._send, args=(left,), daemon=True)
            self._thread.start()
        return list(self._refused.values())

    def _send(self, left: list[tuple[Notice, str]]) -> None:
        refused = {}
        for notice, address in left:
            if address in refused:
                continue
            service = service_of(address)
            if service is not None and service.notify(title=notice.title, body=notice.text):
                self._taken.append((_name(address), notice.key))
                continue
            why = "is no address that apprise knows" if service is None else "did not take a message; it is sent again"
            refused[address] = f"notify: {_place(address)} {why}"
        self._pause = min(2 * self._pause, LONGEST_PAUSE) if refused else FIRST_PAUSE
        self._again = time.monotonic() + self._pause if refused else 0.0
        self._refused = refused


def due(settings: Settings) -> Iterator[Notice]:
    """Yield what there is to tell about a training run, told or not."""
    run = settings.training_run
    for decision in read_decisions(settings):
        what = _NEWS[decision.verdict].format(decision.registered)
        links = [link for link in (decision.page_url, decision.registered_url) if link]
        yield Notice(f"decision {decision.key}", f"{run}: {what}", "\n".join([decision.reason, *links]))
    for row in read_compared(settings):
        if row.broken and row.drift is not None:
            text = (
                f"{row.title}: at step {row.step} its skill is {row.drift.skill:.2f}, {row.promised:.2f} was promised."
            )
            yield Notice(f"drift {row.key} {row.title} {row.step}", f"{run}: drifted", text)
    rows: list[Compared | Scored] = [*read_compared(settings), *read_scored(settings)]
    beaten = [against for row in rows if (against := row.overtaken) is not None]
    for against in {each.registered: each for each in sorted(beaten, key=lambda each: -each.step)}.values():
        # Once a version, by whichever step it was first.
        yield Notice(f"overtaken {against.registered}", f"{run}: overtaken", against.sentence)
    for failure in read_failures(settings):
        yield Notice(f"failed {failure.key}", f"{run}: {failure.run} failed", failure.error)
    stop = read_stop(settings)
    if stop is not None and stop.state in ("stopped", "failed"):
        what = "the training was stopped" if stop.state == "stopped" else "the training could not be stopped"
        yield Notice(f"stop {stop.state} {stop.began}", f"{run}: {what}", stop.failure or f"by {stop.by}")


def service_of(address: str) -> "NotifyBase | None":
    """Return what sends to an address, None for one that apprise does not know; a plain webhook gets JSON."""
    from apprise import Apprise, NotifyBase

    known = Apprise.instantiate(address)
    if known is None and address.startswith(("http://", "https://")):
        known = Apprise.instantiate("json" + address.removeprefix("http"))
    return known if isinstance(known, NotifyBase) else None


def _place(address: str) -> str:
    """Return the beginning of an address: the rest is a secret."""
    parts = urlsplit(address)
    return f"{parts.scheme}://{parts.hostname if parts.scheme.startswith(('http', 'json')) else '…'}"


def _name(address: str) -> str:
    return sha256(address.encode()).hexdigest()[:16]


def _path(settings: Settings) -> Path:
    return settings.home / "told.json"
