"""The command lines of the demo's two processes: one line on a mistake, and a library set up for a very small model."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from flows.demo.errors import DemoError


class Arguments(argparse.ArgumentParser):
    """A parser that answers a wrong argument with one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line on stderr, without the usage that --help gives."""
        self.exit(2, f"{self.prog}: {message}; --help shows an example\n")


def count(text: str) -> int:
    """Return the positive integer written in an argument; anything else is refused."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


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
