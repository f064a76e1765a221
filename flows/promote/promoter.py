"""The process of the local stack that takes approvals of promotions up, one for all registered models.

python -m flows.promote.promoter --tracking-uri URI --downloads DIRECTORY
"""

import argparse
import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from flows.processes import PROMOTER

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment


async def serve(deployment: "RunnerDeployment") -> None:
    """Register the deployment and serve it."""
    from prefect.runner import Runner

    from flows.deployments import clear

    runner = Runner(name=PROMOTER, pause_on_shutdown=False)
    await clear(await runner.aadd_deployment(deployment))
    await runner.start()


def main() -> None:
    """Serve until stopped."""
    from flows.promote.flow import approval_deployment

    parser = argparse.ArgumentParser(
        prog="python -m flows.promote.promoter", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--downloads", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(serve(approval_deployment(options.tracking_uri, options.downloads)))


if __name__ == "__main__":
    main()
