"""What the watcher of a training run saw last, for whoever asks: `watcher.json` in its state directory.

It is written over in place, in the bytes that it has from the start: on a full disk it still says what is waited for.
"""

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass

from flows.settings import Settings
from flows.state.records import read_json

_BYTES = 4096
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True)
class Standing:
    """How full the window is in per cent, one line for a reader, and when that was seen (seconds since the epoch)."""

    at: float
    progress: float
    text: str


def write_standing(settings: Settings, standing: Standing) -> None:
    """Write over what was seen before; raises OSError."""
    content = json.dumps(asdict(standing)).encode().ljust(_BYTES)
    file = os.open(settings.home / "watcher.json", os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.pwrite(file, content, 0)
        os.ftruncate(file, len(content))
    finally:
        os.close(file)


def read_standing(settings: Settings) -> Standing | None:
    """Return what the watcher saw last; None where it has not looked, or is just writing."""
    with suppress(FileNotFoundError, ValueError):
        return read_json(settings.home / "watcher.json", Standing)
    return None


def wait_for_look(settings: Settings, since: float, *, seconds: float, lives: Callable[[], bool]) -> Standing | None:
    """Return the first look after `since` (seconds since the epoch); None after `seconds`, or once it does not live."""
    end = time.monotonic() + seconds
    while True:
        standing = read_standing(settings)
        if standing is not None and standing.at >= since:
            return standing
        if time.monotonic() > end or not lives():
            return None
        time.sleep(_PAUSE_SECONDS)
