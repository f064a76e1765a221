"""Serves the approval of stopping one training run: `python -m tests.integration.stack.serving_stop CONFIG URI`."""

import asyncio
import sys
from pathlib import Path

from prefect.deployments.runner import RunnerDeployment
from prefect.runner import Runner

from flows.deployments import stop_deployment
from flows.runner import clear
from flows.settings import load_settings


async def serve(deployment: RunnerDeployment) -> None:
    runner = Runner(name="relex", pause_on_shutdown=False)
    await clear(await runner.aadd_deployment(deployment))
    sys.stdout.write("cleared\n")
    sys.stdout.flush()
    await runner.start()


if __name__ == "__main__":
    config = Path(sys.argv[1])
    asyncio.run(serve(stop_deployment(config, load_settings(config), tracking_uri=sys.argv[2])))
