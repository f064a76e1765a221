"""The process that serves deployments: it registers them, and runs their flow runs until it is stopped."""

import asyncio
import logging
from collections.abc import Sequence
from uuid import UUID

from httpx import TransportError
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
from prefect.exceptions import ObjectNotFound
from prefect.runner import Runner
from prefect.settings import PREFECT_API_URL
from prefect.states import Crashed

_log = logging.getLogger(__name__)

_RETRY_SECONDS = 2.0


async def serve(
    served: Sequence[RunnerDeployment],
    *,
    name: str,
    at_once: RunnerDeployment | None = None,
    former: Sequence[str] = (),
) -> None:
    """Register the deployments, start a run of the one that is to begin at once, and serve.

    Left to its schedule, it would start up to a period later. `former` are deployments that an earlier version served
    in their place, as flow/deployment: their triggers would go on making runs that nobody takes up. A server that does
    not answer is waited for.
    """
    runner = Runner(name=name, pause_on_shutdown=False)
    while True:
        try:
            await _register(runner, served, at_once=at_once, former=former)
        except TransportError as error:
            # The server may be killed and come back meanwhile; all of it can be said again.
            _log.warning("waiting for the Prefect server at %s: %s", PREFECT_API_URL.value(), error)
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            break
    await runner.start()


async def _register(
    runner: Runner, served: Sequence[RunnerDeployment], *, at_once: RunnerDeployment | None, former: Sequence[str]
) -> None:
    for former_name in former:
        await remove(former_name)
    for deployment in served:
        await clear(await runner.aadd_deployment(deployment))
    if at_once is not None:
        await arun_deployment(f"{at_once.flow_name}/{at_once.name}", timeout=0, as_subflow=False)


async def remove(name: str) -> None:
    """Remove the deployment `flow/deployment` with its triggers and the runs that wait for it, where there is one."""
    async with get_client() as client:
        try:
            deployment = await client.read_deployment_by_name(name)
        except ObjectNotFound:
            return
        await clear(deployment.id)
        # A server keeps the triggers of a deployment that is gone.
        await client.delete_resource_owned_automations(f"prefect.deployment.{deployment.id}")
        await client.delete_deployment(deployment.id)


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
