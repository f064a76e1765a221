"""The command line: `relex …`. Exit status 0 done, 1 refused or failed with one line, 2 usage."""

import logging
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deploy.errors import DeployError
from evaluation.errors import EvaluationError
from flows.cli import configs, evaluate, look, models, operate, predict
from flows.cli.light import WAY_OUT, check, lacking
from flows.cli.options import HEADINGS, err
from flows.console import PlainRecord, print_line
from flows.errors import FlowError
from relex import __version__
from relex.errors import RelexError

# Exit status of what a SIGINT ended, by convention of shells.
_INTERRUPTED = 130


class Headed(TyperGroup):
    """Commands below headings that say what one wants, each in the order it was added."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Return the command that is meant; one that is not installed shows its help and does nothing else."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and "--help" not in rest:
            check(name)
        return name, command, rest

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each heading."""
        commands: list[Any] = [self.get_command(ctx, name) for name in self.list_commands(ctx)]
        shown = [command for command in commands if not command.hidden]
        # Help begins in one column, below every heading.
        widest = max(len(command.name) for command in shown)
        for heading in HEADINGS:
            rows = [
                (command.name.ljust(widest), command.get_short_help_str(formatter.width - 6 - widest))
                for command in shown
                if command.rich_help_panel == heading
            ]
            with formatter.section(heading):
                formatter.write_dl(rows)
        if libraries := lacking():
            formatter.write_paragraph()
            formatter.write_text(f"Without {', '.join(libraries)} most commands only say what they need.")
            # A line of its own, which is not broken inside the name.
            formatter.write_text(WAY_OUT)


app = typer.Typer(
    name="relex",
    cls=Headed,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for part in (look, predict, evaluate, configs, operate, models):
    app.add_typer(part.commands)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"relex {__version__}")
        raise typer.Exit


@app.callback()
def options(
    shown: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Predict later checkpoints of an RLVR training run, test them, and register the one worth having."""


def main() -> None:
    """Run the command line; a refusal is one line on stderr and exit status 1."""
    logging.setLogRecordFactory(PlainRecord)
    try:
        app(prog_name="relex")
    except (RelexError, EvaluationError, DeployError, FlowError) as error:
        _refuse(f"{type(error).__name__}: {' '.join(str(error).split())}")
    except OSError as error:
        # A full disk or a directory without permission: what is half written has no name yet.
        _refuse(f"{type(error).__name__}: {error}")
    except SystemExit as ending:
        # typer makes this of an interrupt, and says nothing.
        if ending.code == _INTERRUPTED:
            err.print("relex: interrupted; what is finished is kept", soft_wrap=True)
        raise


def _refuse(reason: str) -> None:
    print_line(err, f"relex: {reason}")
    sys.exit(1)
