"""How things are shown: tables on a terminal and on a page, lines, progress bars."""

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


class Bars(AbstractContextManager["Bars"]):
    """Progress bars on a terminal, one a piece of work; call with (what, done, total)."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:>24}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[pace]}"),
        )
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, what: str, done: int, total: int, pace: str = "") -> None:
        """Show that `done` of `total` are done, and at which pace in words."""
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, pace="")
        self._progress.update(self._tasks[what], completed=done, total=total, pace=pace)


class JsonLines:
    """Prints what a watcher sees as one JSON object a line, whenever it changes."""

    def __init__(self) -> None:
        self._last = ""

    def __call__(self, progress: float, text: str) -> None:
        """Print the line unless it is the last one again."""
        if text != self._last:
            self._last = text
            sys.stdout.write(json.dumps({"progress": progress, "text": text}) + "\n")
            sys.stdout.flush()


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return a table as the lines of Markdown."""
    # A bar inside a cell would end it.
    lines = [" | ".join(cell.replace("|", r"\|") for cell in row) for row in (headings, *rows)]
    return [f"| {lines[0]} |", "|---" * len(headings) + "|", *(f"| {line} |" for line in lines[1:])]


def plain_table(*headings: str, rows: Iterable[Sequence[str]] = (), title: str | None = None) -> Table:
    """Return a table in the one style of the command line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for number, heading in enumerate(headings):
        # What is cut off is of no use, and the first column is what a reader looks for.
        table.add_column(heading, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*row)
    return table


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """Print a line for each thing that looks wrong."""
    for text in warnings:
        print_line(console, f"warning: {text}")


def print_line(console: Console, text: str) -> None:
    """Print a line that no terminal breaks."""
    # A path that is broken into lines cannot be copied.
    console.print(text, soft_wrap=True, highlight=False)
