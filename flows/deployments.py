"""The process that answers for one training run: serves its deployments and runs their flow runs.

python -m flows.deployments CONFIG --tracking-uri URI
"""

import argparse
import asyncio
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.deployments.flow_runs import arun_deployment
from prefect.deployments.runner import RunnerDeployment
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.schedules import Interval
from prefect.states import Crashed
from prefect.types.entrypoint import EntrypointType

from flows.decide.flow import extrapolate
from flows.drift.flow import drift_deployment
from flows.settings import Settings, load_settings
from flows.state.ledger import WINDOW_READY, resource
from flows.stop.flow import stop_deployment
from flows.watch.watcher import RUN_SECONDS, SCHEDULE_SECONDS, watch


def deployments(
    config: Path, *, tracking_uri: str, run_seconds: float = RUN_SECONDS, schedule_seconds: float = SCHEDULE_SECONDS
) -> list[RunnerDeployment]:
    """Return the deployments of one training run, the watcher's first.

    The watcher runs every `schedule_seconds`; the extrapolation starts on the window event, drift when the run reaches
    what was predicted, and the question whether to stop is asked by the extrapolation.
    """
    settings = load_settings(config)
    where = str(config.absolute())
    watcher = watch.to_deployment(
        name=settings.training_run,
        description=f"Watches {settings.checkpoints}; a decision is due {_until(settings)}.",
        parameters={"config": where, "seconds": run_seconds},
        schedule=Interval(timedelta(seconds=schedule_seconds)),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    extrapolation = extrapolate.to_deployment(
        name=settings.training_run,
        description=f"Decides {_on(settings)}, {_until(settings)}.",
        parameters={"config": where, "tracking_uri": tracking_uri},
        triggers=[
            DeploymentEventTrigger(
                name=f"{settings.training_run}: window ready",
                match={"prefect.resource.id": resource(settings)},
                expect={WINDOW_READY},
                threshold=1,
                parameters={"steps": "{{ event.payload.steps }}", "key": "{{ event.payload.key }}"},
            )
        ],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(watcher, RunnerDeployment)  # outside an event loop nothing is left to await
    assert isinstance(extrapolation, RunnerDeployment)
    return [
        watcher,
        extrapolation,
        drift_deployment(config, settings, tracking_uri=tracking_uri),
        stop_deployment(config, settings, tracking_uri=tracking_uri),
    ]


def _until(settings: Settings) -> str:
    if settings.window != "auto":
        return f"once step {settings.window} is there"
    return f"once the backtest has converged, or step {settings.end} is there"


def _on(settings: Settings) -> str:
    if settings.targets == "auto":
        return "on steps that the backtest proposes"
    return f"on steps {', '.join(map(str, settings.targets))}"


async def clear(deployment: UUID) -> None:
    """Settle what an earlier process left of a deployment: it is served by one process, and that one is gone.

    Runs that never ended would be shown as running for ever; a schedule's late runs would all start now, with the
    parameters of then.
    """
    async with get_client() as client:
        for run in await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(
                deployment_id=FlowRunFilterDeploymentId(any_=[deployment]),
                state=FlowRunFilterState(
                    type=FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED])
                ),
            )
        ):
            if run.state_type is StateType.SCHEDULED:
                if run.auto_scheduled:
                    await client.delete_flow_run(run.id)
            else:
                await client.set_flow_run_state(run.id, Crashed(message="its process is gone"), force=True)


async def serve(served: Sequence[RunnerDeployment]) -> None:
    """Register the deployments, start the first watcher at once, and serve.

    Left to its schedule, the watcher would start up to a period later.
    """
    runner = Runner(name="relex", pause_on_shutdown=False)
    for deployment in served:
        await clear(await runner.aadd_deployment(deployment))
    await arun_deployment(f"{served[0].flow_name}/{served[0].name}", timeout=0, as_subflow=False)
    await runner.start()


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m flows.deployments", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--run-seconds", type=float, default=RUN_SECONDS)
    parser.add_argument("--schedule-seconds", type=float, default=SCHEDULE_SECONDS)
    options = parser.parse_args()
    served = deployments(
        options.config,
        tracking_uri=options.tracking_uri,
        run_seconds=options.run_seconds,
        schedule_seconds=options.schedule_seconds,
    )
    asyncio.run(serve(served))


if __name__ == "__main__":
    main()
