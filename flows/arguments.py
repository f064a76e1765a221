"""The command line of a module that runs as a process of its own: the parameters of one function."""

import logging
import sys
from collections.abc import Callable

import typer
from typer.exceptions import TyperException

from flows.console import PlainRecord


def run_module(module: str, function: Callable[..., None]) -> None:
    """Call the function with what stands behind `python -m module`, and exit.

    Wrong usage is answered in one line and exit status 2.
    """
    # What fails ends in the last line of a plain traceback: that is the one others quote.
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(function)
    logging.setLogRecordFactory(PlainRecord)
    try:
        sys.exit(app(prog_name=f"python -m {module}", standalone_mode=False))
    except TyperException as error:
        sys.stderr.write(f"python -m {module}: {error.format_message().rstrip('.')}; --help shows an example\n")
        sys.exit(2)
