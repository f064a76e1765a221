"""How things are shown: tables on a terminal and on a page, lines, progress bars, what is logged.

Names and errors come from files that others wrote. On a terminal they are text: no character of theirs moves the
cursor, nothing in them is markup.
"""

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.status import Status
from rich.table import Table
from rich.text import Text

# Control characters but for line ends and tabs, the eight-bit ones among them, and what turns the writing around.
_UNPRINTABLE = (*range(9), *range(11, 32), *range(127, 160), 0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F))
_ESCAPED = {
    code: rf"\x{code:02x}" if code < 256 else rf"\u{code:04x}" for code in (*_UNPRINTABLE, *range(0x2066, 0x206A))
}
# Wider than any terminal.
_WIDEST = 10_000
_LINE_ENDS = {ord("\n"): r"\n", 0x2028: r"\u2028", 0x2029: r"\u2029"}


def printable(text: str) -> str:
    """Return the text with every character that a terminal would obey written as an escape, such as \\x1b."""
    return text.translate(_ESCAPED)


class Terminal(Console):
    """A console that writes text as it is, and what a terminal would obey as an escape."""

    def __init__(self, **how: Any) -> None:
        super().__init__(markup=False, emoji=False, **how)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the pieces of what is printed; rich's own control codes are in pieces that say so."""
        for piece in super().render(renderable, options):
            yield piece if piece.control else Segment(printable(piece.text), piece.style)

    def status(self, status: RenderableType, **how: Any) -> Status:
        """Show a line while something runs."""
        return super().status(Text(status) if isinstance(status, str) else status, **how)


class PlainRecord(logging.LogRecord):
    """What is logged, its traceback too, without a character that a terminal would obey."""

    def __init__(self, *what: Any, **more: Any) -> None:
        super().__init__(*what, **more)
        if self.exc_info:
            # Formatters take this where it is there.
            self.exc_text = printable(logging.Formatter().formatException(self.exc_info))

    def getMessage(self) -> str:
        """Return the message with its arguments."""
        return printable(super().getMessage())


class Bars(AbstractContextManager["Bars"]):
    """Progress bars on a terminal, one a piece of work; call with (what, done, total)."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:>24}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[pace]}", markup=False),
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


def print_fitting(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], *parts: Sequence[int]
) -> None:
    """Print one table where it fits the width, else one for each of the parts, which are columns by their number."""

    def table(columns: Sequence[int]) -> Table:
        cells = ([row[column] for column in columns] for row in rows)
        return plain_table(*(headings[column] for column in columns), rows=cells)

    whole = table(range(len(headings)))
    if console.measure(whole, options=console.options.update(max_width=_WIDEST)).maximum <= console.width:
        console.print(whole)
        return
    # Numbers folded into their columns cannot be read.
    for columns in parts:
        console.print(table(columns))


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """Print a line for each thing that looks wrong."""
    for text in warnings:
        print_line(console, f"warning: {text}")


def print_line(console: Console, text: str) -> None:
    """Print one line, whatever it says, that no terminal breaks."""
    # A path that is broken into lines cannot be copied.
    console.print(text.translate(_LINE_ENDS), soft_wrap=True, highlight=False)
