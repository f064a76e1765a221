"""A watcher without a server: `python -m tests.integration.pinning_watcher CONFIG`.

It prints what it would show at every look.
"""

import sys
from pathlib import Path

from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.settings import load_settings
from flows.watch.watcher import watch_store


def show(progress: float, text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    EventsWorker.set_client_override(NullEventsClient)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        watch_store(load_settings(Path(sys.argv[1])), seconds=600.0, on_look=show)
