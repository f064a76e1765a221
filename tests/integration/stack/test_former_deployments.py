"""A server that served an earlier version has deployments that nobody serves any more: they go, with their triggers."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from deploy.local import daemon, stack
from deploy.local.stack import Stack
from tests.helpers.api import call
from tests.helpers.stacks import auth
from tests.helpers.straight_run import WriteCheckpoint
from tests.helpers.waiting import wait_for

# As the flow that decides was deployed before it was called `decide`, with a run that waits for it.
FORMER = """
import asyncio
from prefect import flow
from prefect.deployments.flow_runs import run_deployment
from prefect.events.schemas.deployment_triggers import DeploymentEventTrigger
from prefect.runner import Runner
from prefect.types.entrypoint import EntrypointType
trigger = DeploymentEventTrigger(
    name="tiny: window ready", match={"prefect.resource.id": "relex.training-run.tiny"}, expect={"relex.window.ready"},
    threshold=1,
)
@flow(name="extrapolate")
def extrapolate() -> None: ...
made = extrapolate.to_deployment("tiny", triggers=[trigger], entrypoint_type=EntrypointType.MODULE_PATH)
asyncio.run(Runner(name="former").aadd_deployment(made))
run_deployment("extrapolate/tiny", timeout=0, as_subflow=False)
"""


@pytest.mark.slow
def test_the_deployment_of_an_earlier_version_is_removed_with_its_triggers_and_waiting_runs(
    config: Path, write_checkpoint: WriteCheckpoint, servers: Stack, server_environment: dict[str, str]
) -> None:
    write_checkpoint(0)
    api = servers.prefect_api_url

    def named(flow: str) -> str | None:
        answer = httpx.get(f"{api}/deployments/name/{flow}/tiny", auth=auth(servers), timeout=60)
        return None if answer.status_code == 404 else str(answer.raise_for_status().json()["id"])

    def triggers(deployment: str) -> list[object]:
        owner = f"prefect.deployment.{deployment}"
        return list(call("GET", f"{api}/automations/related-to/{owner}", auth=auth(servers)))

    def waiting(deployment: str) -> list[object]:
        asked = {"flow_runs": {"deployment_id": {"any_": [deployment]}, "state": {"type": {"any_": ["SCHEDULED"]}}}}
        return list(call("POST", f"{api}/flow_runs/filter", asked, auth=auth(servers)))

    subprocess.run([sys.executable, "-c", FORMER], env=server_environment, check=True)
    former = named("extrapolate")
    assert former is not None
    assert len(triggers(former)) == 1
    assert len(waiting(former)) == 1

    argv = [sys.executable, "-m", "flows.deployments", str(config), "--tracking-uri", servers.mlflow_url]
    stack.spawn(servers.home, "former", argv, environment=server_environment)
    try:
        # The last that is registered is there: all are.
        wait_for("the deployments", lambda: named("stop-training"))
        assert named("decide") is not None
        assert named("extrapolate") is None
        assert triggers(former) == []
        assert waiting(former) == []
    finally:
        daemon.stop(servers.home, ["former"])
