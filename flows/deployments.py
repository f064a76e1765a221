"""What is deployed for one training run, and the command that serves it.

python -m flows.deployments CONFIG --tracking-uri URI
"""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer
from prefect.deployments.runner import RunnerDeployment
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.schedules import Interval
from prefect.types.entrypoint import EntrypointType

from flows.arguments import run_module
from flows.decide.flow import decide
from flows.drift.flow import drift
from flows.reground.flow import reground
from flows.reground.settings import is_reground, load_reground_settings
from flows.runner import serve
from flows.settings import Settings, load_settings
from flows.state.events import TARGET_REACHED, WINDOW_READY, resource
from flows.stop.flow import stop_flow
from flows.watch.flow import RUN_SECONDS, SCHEDULE_SECONDS, watch

# Flows that earlier versions deployed under the name of the training run; `extrapolate` is `decide` now.
_FORMER_FLOWS = ("extrapolate",)


def deployments(
    config: Path, *, tracking_uri: str, run_seconds: float = RUN_SECONDS, schedule_seconds: float = SCHEDULE_SECONDS
) -> list[RunnerDeployment]:
    """Return the deployments of one training run, the watcher's first.

    The watcher runs every `schedule_seconds`; the decision starts on the window event, drift when the run reaches what
    was predicted, and the question whether to stop is asked by the decision.
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
    decision = decide.to_deployment(
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
    assert isinstance(decision, RunnerDeployment)
    return [
        watcher,
        decision,
        drift_deployment(config, settings, tracking_uri=tracking_uri),
        stop_deployment(config, settings, tracking_uri=tracking_uri),
    ]


def reground_deployment(
    config: Path, *, tracking_uri: str, schedule_seconds: float = SCHEDULE_SECONDS
) -> RunnerDeployment:
    """Return the deployment of a re-grounding: a killed run is taken up by the next one of the schedule."""
    settings = load_reground_settings(config)
    made = reground.to_deployment(
        name=settings.training_run,
        description=f"Alternates {settings.real_steps} real steps and a jump, up to step {settings.total_steps}.",
        parameters={"config": str(config.absolute()), "tracking_uri": tracking_uri},
        schedule=Interval(timedelta(seconds=schedule_seconds)),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # outside an event loop nothing is left to await
    return made


def drift_deployment(config: Path, settings: Settings, *, tracking_uri: str) -> RunnerDeployment:
    """Return the deployment of the flow, which starts on the event of a target that was reached."""
    made = drift.to_deployment(
        name=settings.training_run,
        description="Compares what was predicted with what the run reaches.",
        parameters={"config": str(config.absolute()), "tracking_uri": tracking_uri},
        triggers=[
            DeploymentEventTrigger(
                name=f"{settings.training_run}: target reached",
                match={"prefect.resource.id": resource(settings)},
                expect={TARGET_REACHED},
                threshold=1,
                parameters={"step": "{{ event.payload.step }}"},
            )
        ],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(made, RunnerDeployment)  # outside an event loop nothing is left to await
    return made


def stop_deployment(config: Path, settings: Settings, *, tracking_uri: str) -> RunnerDeployment:
    """Return the deployment that asks; `offer` starts its runs."""
    deployment = stop_flow.to_deployment(
        name=settings.training_run,
        description="Asks whether the training is to be stopped, and does as is answered.",
        parameters={"config": str(config.absolute()), "tracking_uri": tracking_uri},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment)  # outside an event loop nothing is left to await
    return deployment


def _until(settings: Settings) -> str:
    if settings.window != "auto":
        return f"once step {settings.window} is there"
    return f"once the backtest has converged, or step {settings.end} is there"


def _on(settings: Settings) -> str:
    if settings.targets == "auto":
        return "on steps that are climbed while scores last"
    return f"on steps {', '.join(map(str, settings.targets))}"


def main(
    config: Path,
    tracking_uri: Annotated[str, typer.Option()],
    run_seconds: float = RUN_SECONDS,
    schedule_seconds: float = SCHEDULE_SECONDS,
) -> None:
    """Serve the deployments of one training run, or of one re-grounding, until stopped.

    Example: python -m flows.deployments relex.yaml --tracking-uri http://127.0.0.1:5000
    """
    if is_reground(config):
        made = reground_deployment(config, tracking_uri=tracking_uri, schedule_seconds=schedule_seconds)
        asyncio.run(serve([made], name="relex", at_once=made))
        return
    served = deployments(config, tracking_uri=tracking_uri, run_seconds=run_seconds, schedule_seconds=schedule_seconds)
    former = [f"{flow}/{served[0].name}" for flow in _FORMER_FLOWS]
    asyncio.run(serve(served, name="relex", at_once=served[0], former=former))


if __name__ == "__main__":
    run_module("flows.deployments", main)
