"""Periodic re-grounding as a Prefect flow: progress while it runs, a task for each phase, a page after each cycle."""

from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.errors import AtWorkError
from flows.log import show_own_lines
from flows.progress import ProgressArtifact
from flows.reground.cycle import jump, train
from flows.reground.judge import judge
from flows.reground.loop import Phases, Regrounding
from flows.reground.loop import reground as run_cycles
from flows.reground.page import page
from flows.reground.record import record
from flows.reground.settings import load_reground_settings
from flows.run_names import flow_run_name
from flows.state.records import read_json, write_json

# Training is not tried again by itself: what failed after hours would, and the log says more than a second try.
train_task = task(name="train", task_run_name="train cycle {plan.number}", cache_policy=NO_CACHE)(train)
jump_task = task(
    name="jump", task_run_name="jump cycle {plan.number}", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE
)(jump)
judge_task = task(
    name="judge", task_run_name="judge cycle {plan.number}", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE
)(judge)

record_task = task(name="record", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(record)


@flow(name="reground", flow_run_name=flow_run_name(lambda run, _: f"reground {run}"))
def reground(config: str, tracking_uri: str) -> State[Any]:
    """Run the re-grounding described in the file `config` to its end, or go on with it; one at work is left alone."""
    show_own_lines()
    settings = load_reground_settings(Path(config))
    key = f"reground-{settings.training_run}"

    shown = settings.home / "shown.json"

    def show(regrounding: Regrounding) -> None:
        # A schedule comes back to what has long ended.
        if shown.is_file() and read_json(shown, int) >= len(regrounding.cycles):
            return
        record_task(settings, regrounding, tracking_uri=tracking_uri)
        create_markdown_artifact(page(regrounding), key=f"{key}-cycles", description=regrounding.cycles[-1].reason)
        write_json(shown, len(regrounding.cycles))

    try:
        regrounding = run_cycles(
            settings,
            phases=Phases(train_task, jump_task, judge_task),
            tell=ProgressArtifact(key, "reground"),
            on_cycle=show,
        )
    except AtWorkError as error:
        return Completed(message=str(error))
    return Completed(message=f"{regrounding.ended}: {regrounding.model}")
