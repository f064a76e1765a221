"""The process of the local stack that takes approvals of promotions up, and judges what was set on MLflow's own pages.

One for all registered models:

python -m flows.promote.promoter --tracking-uri URI --downloads DIRECTORY
"""

import asyncio
import logging
from pathlib import Path
from typing import Annotated

import typer
from prefect.deployments.runner import RunnerDeployment

from deploy import registry
from deploy.errors import DeployError
from flows.arguments import run_module
from flows.processes import PROMOTER
from flows.promote.flow import approval_deployment
from flows.promote.promotion import settle
from flows.runner import serve

# Who sets an alias looks at the page for a minute at most.
_PAUSE_SECONDS = 15.0

# Not one of those that Prefect sends to the page of a flow run: there is none here.
logger = logging.getLogger(PROMOTER)


def main(tracking_uri: Annotated[str, typer.Option()], downloads: Annotated[Path, typer.Option()]) -> None:
    """Take approvals of promotions up and judge what was set in MLflow, until stopped.

    Example: python -m flows.promote.promoter --tracking-uri http://127.0.0.1:5000 --downloads ~/.relex/models
    """
    logger.setLevel(logging.INFO)
    # Made outside an event loop, where nothing of it is left to await.
    approval = approval_deployment(tracking_uri, downloads)
    asyncio.run(_serve(approval, tracking_uri, downloads))


async def _serve(approval: RunnerDeployment, tracking_uri: str, downloads: Path) -> None:
    tasks = [
        asyncio.create_task(serve([approval], name=PROMOTER)),
        asyncio.create_task(_judge(tracking_uri, downloads)),
    ]
    done, others = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in others:
        task.cancel()
    for task in done:
        task.result()


async def _judge(tracking_uri: str, downloads: Path) -> None:
    troubles: list[str] = []
    while True:
        outcome = await asyncio.to_thread(settle_all, tracking_uri, downloads)
        troubles = _log(outcome, troubles)
        await asyncio.sleep(_PAUSE_SECONDS)


def _log(outcome: tuple[list[str], list[str]], known: list[str]) -> list[str]:
    """Log what was judged, and trouble that is not `known` yet; return the trouble."""
    judged, troubles = outcome
    for line in judged:
        logger.info("%s", line)
    for line in troubles:
        if line not in known:
            logger.warning("what was set in MLflow is not judged: %s", line)
    return troubles


def settle_all(tracking_uri: str, downloads: Path) -> tuple[list[str], list[str]]:
    """Judge what was set in MLflow for every registered model; return what came of it, and what hindered it."""
    judged: list[str] = []
    troubles: list[str] = []
    try:
        names = registry.names(tracking_uri=tracking_uri)
    except DeployError as error:
        return judged, [str(error)]
    for name in names:
        try:
            judged += [each.sentence for each in settle(name, tracking_uri=tracking_uri, downloads=downloads)]
        except DeployError as error:
            troubles.append(str(error))
    return judged, troubles


if __name__ == "__main__":
    run_module("flows.promote.promoter", main)
