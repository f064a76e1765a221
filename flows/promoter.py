"""The process of the local stack that takes approvals of promotions up, one for all registered models.

python -m flows.promoter --tracking-uri URI --downloads DIRECTORY
"""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flows import stack
from flows.stack import Stack

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

SERVICE = "promoter"


def spawn(running: Stack) -> None:
    """Start the process in the background; a live one is left alone."""
    argv = [sys.executable, "-m", "flows.promoter", "--tracking-uri", running.mlflow_url]
    argv += ["--downloads", str(running.home / "models")]
    stack.spawn(running.home, SERVICE, argv, environment=stack.environment(running))


def revive(running: Stack) -> None:
    """Start it where it was ever started: an answer may be waiting for it."""
    if any(found.name == SERVICE for found in stack.status(running.home)):
        spawn(running)


async def serve(deployment: "RunnerDeployment") -> None:
    """Register the deployment and serve it."""
    from prefect.runner import Runner

    from flows.serve import clear

    runner = Runner(name=SERVICE, pause_on_shutdown=False)
    await clear(await runner.aadd_deployment(deployment))
    await runner.start()


def main() -> None:
    """Serve until stopped."""
    from flows.promote_approval import approval_deployment

    parser = argparse.ArgumentParser(prog="python -m flows.promoter", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--downloads", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(serve(approval_deployment(options.tracking_uri, options.downloads)))


if __name__ == "__main__":
    main()
