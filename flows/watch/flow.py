"""The watcher as a Prefect flow.

It runs a while and ends, so that the server keeps a live, short list of runs; a schedule starts the next one.
"""

import logging
from pathlib import Path
from typing import Any

import httpx
from prefect import flow
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.errors import WatchError
from flows.log import show_own_lines
from flows.run_names import flow_run_name
from flows.settings import load_settings
from flows.watch.watcher import watch_store

logger = logging.getLogger(__name__)

# Longer than the schedule's period: the next watcher is there and waits when this one ends.
RUN_SECONDS = 620.0
SCHEDULE_SECONDS = 600.0
_HANDOVER_SECONDS = 40.0


@flow(name="watch", flow_run_name=flow_run_name(lambda run, _: f"watch {run}"), retries=0, validate_parameters=False)
def watch(config: str, seconds: float = RUN_SECONDS) -> State[Any]:
    """Watch the training run described in the file `config`; progress is an artifact of the flow run."""
    show_own_lines()
    settings = load_settings(Path(config))
    artifact: Any = None
    shown = ""

    def show(progress: float, text: str) -> None:
        nonlocal artifact, shown
        if text == shown:
            return
        try:
            if artifact is None:
                artifact = create_progress_artifact(0.0, key=f"window-{settings.training_run}", description="looking")
            update_progress_artifact(artifact, progress, description=text)
        except httpx.HTTPError as error:
            # A server on a full disk refuses what a page would show; what it shows next is as good.
            logger.info("the page does not show it: %s", error)
        else:
            shown = text

    try:
        watch_store(settings, seconds=seconds, on_look=show, patience=_HANDOVER_SECONDS)
    except WatchError as error:
        return Completed(message=str(error))
    return Completed(message=shown)
