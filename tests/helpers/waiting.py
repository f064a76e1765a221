"""Waiting for what another process does."""

import time
from collections.abc import Callable
from typing import TypeVar

Seen = TypeVar("Seen")


def wait_for(what: str, look: Callable[[], Seen | None], *, seconds: float = 480) -> Seen:
    """Return what `look` sees once that is neither None nor False; fails with `what` after so many seconds.

    So long for a machine that is busy with other things: what comes at all comes much sooner.
    """
    end = time.monotonic() + seconds
    while (seen := look()) is None or seen is False:
        assert time.monotonic() < end, f"{what} did not come within {seconds:.0f} s"
        time.sleep(0.05)
    return seen
