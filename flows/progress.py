"""Progress of long work, as one line in the Prefect UI."""

import time
from typing import Any

from prefect.artifacts import (
    create_progress_artifact,
    update_progress_artifact,
)

# A progress artifact is a row in the server's database: more than one a second is noise.
_PROGRESS_SECONDS = 1.0


class ProgressArtifact:
    """One line of progress in the Prefect UI; the text carries the numbers, since the UI hides the percentage."""

    def __init__(self, key: str, title: str) -> None:
        self._title = title
        self._last = time.monotonic()
        self._artifact: Any = create_progress_artifact(0.0, key=key, description=title)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if done < total and time.monotonic() - self._last < _PROGRESS_SECONDS:
            return
        self._last = time.monotonic()
        share = 100.0 * done / max(total, 1)
        update_progress_artifact(self._artifact, share, description=f"{self._title}: {what} {share:.0f} %")
