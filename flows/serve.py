"""The process that answers for one training run: serves its two deployments and runs their flow runs.

python -m flows.serve CONFIG --tracking-uri URI
"""

import argparse
import asyncio
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
from prefect.deployments.flow_runs import arun_deployment
from prefect.deployments.runner import RunnerDeployment
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.schedules import Interval
from prefect.types.entrypoint import EntrypointType

from flows.extrapolate import extrapolate
from flows.ledger import WINDOW_READY, resource
from flows.settings import load_settings
from flows.watch import RUN_SECONDS, SCHEDULE_SECONDS, watch


def deployments(
    config: Path, *, tracking_uri: str, run_seconds: float = RUN_SECONDS, schedule_seconds: float = SCHEDULE_SECONDS
) -> list[RunnerDeployment]:
    """Return the watcher's and the extrapolation's deployment of one training run.

    The watcher runs every `schedule_seconds`, never two at a time; the extrapolation starts on the window event.
    """
    settings = load_settings(config)
    where = str(config.absolute())
    watcher = watch.to_deployment(
        name=settings.training_run,
        description=f"Watches {settings.checkpoints} until step {settings.window} is there.",
        parameters={"config": where, "seconds": run_seconds},
        schedule=Interval(timedelta(seconds=schedule_seconds)),
        concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    extrapolation = extrapolate.to_deployment(
        name=settings.training_run,
        description=f"Decides on steps {', '.join(map(str, settings.targets))} once step {settings.window} is there.",
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
    return [watcher, extrapolation]


async def serve(served: Sequence[RunnerDeployment]) -> None:
    """Register the deployments, start the first watcher at once, and serve.

    Left to its schedule, the watcher would start up to a period later.
    """
    runner = Runner(name="relex", pause_on_shutdown=False)
    for deployment in served:
        await runner.aadd_deployment(deployment)
    await arun_deployment(f"{served[0].flow_name}/{served[0].name}", timeout=0, as_subflow=False)
    await runner.start()


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=(__doc__ or "").splitlines()[0])
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
