"""The process of the local stack that takes approvals of promotions up, one for all registered models.

python -m flows.promote.promoter --tracking-uri URI --downloads DIRECTORY
"""

import argparse
import asyncio
from pathlib import Path

from flows.processes import PROMOTER
from flows.promote.flow import approval_deployment
from flows.runner import serve


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.promote.promoter", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--tracking-uri", required=True)
    parser.add_argument("--downloads", type=Path, required=True)
    options = parser.parse_args()
    asyncio.run(serve([approval_deployment(options.tracking_uri, options.downloads)], name=PROMOTER))


if __name__ == "__main__":
    main()
