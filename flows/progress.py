"""What the Prefect UI shows of work: progress as one line, and what each task found in its log."""

import logging
import time
from typing import Any

from prefect.artifacts import (
    create_progress_artifact,
    update_progress_artifact,
)
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

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


def log_result(text: str) -> None:
    """Write a line to the log of the task or flow run that is at work, and without one to this process's own log."""
    try:
        get_run_logger().info("%s", text)
    except MissingContextError:
        logging.getLogger(__name__).info("%s", text)
