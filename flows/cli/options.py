"""Options that several commands take, and where all of them print."""

import inspect
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from typer.core import TyperCommand

from flows.console import Bars, Terminal, print_line

if TYPE_CHECKING:
    from relex.files.block_cache import BlockCache

out = Terminal()
err = Terminal(stderr=True)

# What a command is about: the headings of the help, in their order.
RUN, DECISION, MODEL, STUDY = HEADINGS = ("A run", "A decision", "A model", "A study")
HOME = Path.home() / ".relex"
# Stands in a help for what the table of methods says, which comes with a library that takes seconds to import.
EVERY_METHOD = "<methods>"


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is not a size; write 4GiB or 512MiB") from None


Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory or URL the trainer writes its checkpoints to.")]
Base = Annotated[str, typer.Option(help="Directory or URL of the model the run started from.", show_default=False)]
Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="A relex.yaml.")]
Registered = Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model.")]
TargetSteps = Annotated[list[int], typer.Option(help="Training step to predict; may be given several times.")]
Benchmarks = Annotated[list[str], typer.Option(help="Benchmark: a shipped name or a YAML file; may be repeated.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Score only the first problems.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Home = Annotated[
    Path, typer.Option(envvar="RELEX_HOME", help="Where the local stack keeps its state.", show_default="~/.relex")
]
Cache = Annotated[
    Path | None, typer.Option(help="Where what was measured is kept for the next call (default: the user's cache).")
]


@dataclass(frozen=True)
class Reading:
    """Options of every command that reads the checkpoints of a run; a group (see `grouped`)."""

    window: Annotated[
        int | None, typer.Option(min=1, help="Use checkpoints up to this training step (default: all).")
    ] = None
    memory: Annotated[int, typer.Option(parser=_bytes, metavar="SIZE", help="Memory for reading and combining.")] = (
        "4GiB"  # type: ignore[assignment]
    )
    threads: Annotated[int, typer.Option(min=1, help="Threads for reading and combining.")] = os.cpu_count() or 1
    cache: Cache = None
    cache_size: Annotated[
        int,
        typer.Option(parser=_bytes, metavar="SIZE", help="Disk for what is read from a URL, until it has been read."),
    ] = "8GiB"  # type: ignore[assignment]

    @property
    def kept(self) -> Path:
        """Where what was measured is kept."""
        return cache_directory(self.cache)

    @property
    def grams(self) -> Path:
        """Where the Gram matrices of runs are kept."""
        return self.kept / "grams"

    @contextmanager
    def session(self) -> "Iterator[tuple[Bars, BlockCache]]":
        """Show progress bars, and keep what is read from URLs, while the block runs."""
        from relex.files.block_cache import BlockCache

        with Bars(err) as bars, BlockCache(self.kept, size=self.cache_size) as blocks:
            yield bars, blocks


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, as options of its own, the fields of the dataclasses among its parameters.

    typer reads a function's signature and knows no groups of options. The command gets the dataclasses, built.
    """
    parameters = inspect.signature(command).parameters.values()
    groups: dict[str, Any] = {each.name: each.annotation for each in parameters if is_dataclass(each.annotation)}

    @wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    options = []
    for each in parameters:
        if each.name in groups:
            options += [
                each.replace(name=field.name, annotation=field.type, default=field.default)
                for field in fields(groups[each.name])
            ]
        else:
            options.append(each)
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return run


class ListsMethods(TyperCommand):
    """A command with an option that takes a method: its help lists them all."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help, with the methods in the place kept for them."""
        from relex.predictors import option_help

        parameters: list[Any] = [*self.params]
        for parameter in parameters:
            if parameter.help is not None:
                parameter.help = parameter.help.replace(EVERY_METHOD, option_help())
        super().format_help(ctx, formatter)


def cache_directory(given: Path | None) -> Path:
    """Return where what was measured is kept: the directory given, or the user's cache."""
    import platformdirs

    return given if given is not None else platformdirs.user_cache_path("relex")


def print_json(content: Any) -> None:
    """Print what a machine reads."""
    typer.echo(json.dumps(content, indent=1, default=str))


def print_sentence(text: str) -> None:
    """Print a line."""
    print_line(out, text)
