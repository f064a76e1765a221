"""The process of the local stack that takes approvals of promotions up, one for all registered models.

python -m flows.promote.promoter --tracking-uri URI --downloads DIRECTORY
"""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from flows.arguments import run_module
from flows.processes import PROMOTER
from flows.promote.flow import approval_deployment
from flows.runner import serve


def main(tracking_uri: Annotated[str, typer.Option()], downloads: Annotated[Path, typer.Option()]) -> None:
    """Take approvals of promotions up until stopped.

    Example: python -m flows.promote.promoter --tracking-uri http://127.0.0.1:5000 --downloads ~/.relex/models
    """
    asyncio.run(serve([approval_deployment(tracking_uri, downloads)], name=PROMOTER))


if __name__ == "__main__":
    run_module("flows.promote.promoter", main)
