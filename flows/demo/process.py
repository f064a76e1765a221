"""The demo's two processes: an environment for a very small model, and one line when they refuse."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Literal

from flows.demo.errors import DemoError

Task = Literal["sort", "add", "revcomp", "product", "largest"]


def execute(work: Callable[[], None]) -> None:
    """Run a command's work and exit: 0 when done, 1 with one line when it refuses, 130 when interrupted.

    Has to come before torch, transformers or trl are imported, which read what it sets in the environment only then.
    """
    # On a model this small a second thread costs more in waiting than it computes, and it takes the core on which the
    # rest of the pipeline runs. Passive, because an idle OpenMP thread otherwise spins.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    # Everything is local: no request to a hub, and no usage report of trl's.
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers would draw a bar for every checkpoint written
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        work()
    except DemoError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
