"""What the command line shows: tables and progress bars."""

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from relex.output.manifest import Manifest
from relex.store import State

if TYPE_CHECKING:
    from deploy.local.stack import Service
    from evaluation.benchmarks.catalog import Entry
    from evaluation.verdict.report import Evaluated, Setting
    from flows.promote.listing import Listing
    from flows.study.analyze import Analyzed
    from flows.study.comparison import Comparison
    from relex.backtest.backtest import Backtest
    from relex.inspection import Inspection

# Of a long run the first and last steps say what a reader needs; --json has them all.
_ROWS = 12
# Wider than any terminal.
_WIDEST = 10_000


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


def plain_table(*headings: str, title: str | None = None) -> Table:
    """Return an empty table in the one style of the command line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title)
    for number, heading in enumerate(headings):
        # What is cut off is of no use, and the first column is what a reader looks for.
        table.add_column(heading, overflow="fold", no_wrap=number == 0)
    return table


def show_inspection(console: Console, found: "Inspection") -> None:
    """Print the steps of a training run and how straight it is."""
    steps = found.steps
    console.print(f"{found.run}: {len(steps)} steps, {found.tensors} tensors, {found.parameters:,} parameters")
    table = plain_table("step", "state", "layout", "dtype", "‖Δ‖/‖base‖", "reason")
    hidden = 0
    for number, row in enumerate(steps):
        if _ROWS // 2 <= number < len(steps) - _ROWS // 2 and row.state is State.READY:
            hidden += 1
            continue
        if hidden:
            table.add_row("…", f"{hidden} ready", "", "", "", "")
            hidden = 0
        delta = f"{row.relative_delta:.2e}" if row.relative_delta is not None else ""
        table.add_row(str(row.step), row.state, row.layout, row.dtype, delta, row.reason)
    console.print(table)
    print_warnings(console, [item.text for item in found.findings])
    if found.straightness is None:
        console.print("fewer than 2 checkpoints are ready: nothing to fit")
        return
    console.print(
        f"rank-1 energy {found.straightness.energy:.3f}, R² of the leading coordinate on the step"
        f" {found.straightness.r_squared:.3f} (both weighted by the size of the deltas)"
    )


def show_backtest(console: Console, found: "Backtest") -> None:
    """Print the skill of every form by horizon, for windows that begin where the recommended one does."""
    advice = found.recommendation
    # --json has all windows; where nothing is recommended the whole one is what a reader would have used.
    start = advice.way.start if advice.way is not None else 0.0
    shown = [cell for cell in found.cells if cell.way.start == start]
    horizons = sorted({cell.horizon for cell in shown})
    table = plain_table("method", *(f"{horizon:g} x" for horizon in horizons))
    for method in dict.fromkeys(cell.way.method for cell in shown):
        cells = {cell.horizon: cell for cell in shown if cell.way.method == method}
        # What was beaten for sure has its lower bound with it.
        table.add_row(
            method,
            *(
                ""
                if horizon not in cells
                else f"{cells[horizon].skill:.2f}"
                + (f" ≥{cells[horizon].lower_bound:.2f}" if cells[horizon].trusted else "")
                for horizon in horizons
            ),
        )
    console.print(
        f"{len(found.steps)} checkpoints, steps {found.steps[0]} to {found.steps[-1]}; skill against holding the latest"
        " (1: exact, 0: no better) by horizon in multiples of the steps seen, with its lower bound where it is trusted"
    )
    console.print(table)
    aim = f", window from step {advice.start}, target up to step {advice.target_step}" if advice.target_step else ""
    if advice.norm_band is not None:
        aim += (
            f" (‖Δ‖ {advice.norm_band[0]:.2f} – {advice.norm_band[1]:.2f} of the latest if it goes on straight, 90 %)"
        )
    print_line(console, f"recommended: {advice.method}{aim}")
    print_line(console, advice.reason)


def show_extrapolation(console: Console, manifests: Mapping[str, Manifest]) -> None:
    """Print what was predicted and how far it is from what was seen."""
    columns = ["predicted", "‖Δ‖ vs latest", "norm band 90 %", "Σ|c| at most"]
    if any(found.adapter is not None for found in manifests.values()):
        columns += ["rank at most", "error at most"]
    table = plain_table(*columns)
    for location, found in manifests.items():
        item = found.forecast
        latest = item.norm_latest or 1.0
        band = f"{item.norm_band[0] / latest:.2f} – {item.norm_band[1] / latest:.2f}" if item.norm_band else "—"
        row = [location, f"{item.norm / latest:.2f} x", band, f"{item.amplification:.1f}"]
        if found.adapter is not None:
            row += [str(found.adapter.rank), f"{found.adapter.error:.1e}"]
        table.add_row(*row)
    first = next(iter(manifests.values())).forecast
    console.print(
        f"{first.method} from {len(first.steps)} checkpoints, steps {first.steps[0]} to {first.steps[-1]}:"
        f" rank-1 energy {first.energy:.3f}, R² {first.r_squared:.3f}"
    )
    print_warnings(console, first.warnings)
    console.print(table)


def show_benchmarks(console: Console, found: Sequence["Entry"]) -> None:
    """Print what each benchmark measures and how, and where its problems lie."""
    table = plain_table("benchmark", "problems", "measures", "samples; tokens", "fetched")
    for item in found:
        count = "?" if item.problems is None else f"{item.problems:,}"
        table.add_row(item.name, count, item.measures, _generated(item.settings), item.commit[:7] or "no")
    console.print(table)
    for place in dict.fromkeys(str(Path(item.directory).parent) for item in found if item.directory):
        print_line(console, f"fetched benchmarks lie in {place}")
    print_warnings(
        console,
        [
            f"{item.left_out} rows of {item.hub} have no answer to grade by and are not in {item.name}"
            for item in found
            if item.left_out
        ],
    )


def _generated(settings: "Mapping[str, Setting]") -> str:
    if not settings:
        return "likelihoods"
    if settings["temperature"] == 0:
        how = "greedy"
    else:
        how = f"{settings['samples']} x T {settings['temperature']:g}, top-p {settings['top_p']:g}"
    return f"{how}; {settings['max_new_tokens']}"


def show_evaluated(console: Console, found: Sequence["Evaluated"]) -> None:
    """Print scores as lm-eval's command line does, with 95 % intervals, and what else was counted."""
    from evaluation.verdict.export import read_rows

    table = plain_table("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", "95 %")
    # Ten columns need all of a terminal's 80 characters.
    table.padding = 0
    arrows = {True: "↑", False: "↓", None: ""}
    for item in found:
        name, version = item.report.benchmark, None
        for row in read_rows(item):
            error = ("", "") if row.stderr is None else ("±", f"{row.stderr:.4f}")
            ends = "" if row.interval is None else f"{row.interval[0]:.4f}–{row.interval[1]:.4f}"
            table.add_row(
                name,
                row.version if version is None else "",
                row.filter,
                row.n_shot,
                row.metric,
                arrows[row.higher_is_better],
                f"{row.value:.4f}",
                *error,
                ends,
            )
            name, version = "", row.version
    console.print(table)
    for item in found:
        report = item.report
        truncated = f", {100 * report.rates['truncated']:.1f} % cut off" if "truncated" in report.rates else ""
        print_line(console, f"{report.benchmark}: {report.n} problems{truncated}, {report.seconds:,.1f} s in the model")


def show_comparison(console: Console, found: "Comparison", directory: Path) -> None:
    """Print every model that was compared, by step."""
    from flows.study.comparison import cells, headings

    names, rows = headings(found), [cells(row) for row in found.rows]

    def table(columns: Sequence[int]) -> Table:
        part = plain_table(*(names[column] for column in columns))
        for row in rows:
            part.add_row(*(row[column] for column in columns))
        return part

    console.print(found.summary)
    print_warnings(console, found.warnings)
    console.print("; ".join(f"{item.benchmark}: {item.n} problems" for item in found.scored), highlight=False)
    whole = table(range(len(names)))
    if console.measure(whole, options=console.options.update(max_width=_WIDEST)).maximum <= console.width:
        console.print(whole)
    else:
        # Numbers folded into their columns cannot be read: accuracy first, then nearness and cost.
        scores = 2 + 2 * len(found.scored)
        console.print(table(range(scores)))
        console.print(table([0, 1, *range(scores, len(names))]))
    print_line(console, f"more, and a figure: {directory / 'compare.md'}")


def show_analysis(console: Console, found: "Analyzed", directory: Path) -> None:
    """Print how straight a run is by module type."""
    from flows.study.analyze import HEADINGS, cells, described

    analysis = found.analysis
    table = plain_table(*HEADINGS)
    for part in (*analysis.modules, analysis.whole):
        table.add_row(*cells(part))
    console.print(table)
    print_warnings(console, analysis.warnings)
    console.print(described("weights", analysis.whole.weights), highlight=False)
    if found.tokens is not None:
        console.print(described("token log-probabilities", found.tokens), highlight=False)
    print_line(console, f"more, and figures: {directory / 'analysis.md'}")


def show_services(console: Console, services: Sequence["Service"]) -> None:
    """Print the processes of the local stack."""
    if not services:
        console.print("nothing is running")
        return
    table = plain_table("service", "state", "pid", "address")
    for item in services:
        table.add_row(item.name, item.state, str(item.pid or ""), item.url or "")
    console.print(table)
    print_line(console, f"logs: {services[0].log.parent}")


def show_models(console: Console, found: "Listing") -> None:
    """Print the registered predictions, newest first, and how the champion came to be it."""
    if not found.versions:
        console.print(f"no prediction of {found.name} is registered")
        return
    table = plain_table("version", "step", "digest", "verdict", "promoted", "weights", title=found.versions[0].row.name)
    for item in found.versions:
        row = item.row
        table.add_row(
            f"v{row.version}",
            str(row.target_step),
            row.digest[:12],
            row.tags.get("verdict", ""),
            "" if item.promoted is None else f"{found.name} v{item.promoted}{', champion' * row.champion}",
            item.state.split(":", maxsplit=1)[0],
        )
    console.print(table)
    for item in found.versions:
        if item.gate:
            print_line(console, f"gate of v{item.row.version}: {item.gate}")
        print_line(console, f"weights of v{item.row.version}: {item.row.weights}")
    print_warnings(console, [item.state for item in found.versions if item.state.startswith("damaged")])
    if not found.trail:
        return
    trail = plain_table("#", "when", "who", "what", "verdict")
    for entry in found.trail[-_ROWS:]:
        when = datetime.fromtimestamp(entry.at_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M")
        before, after = (
            "—" if version is None else f"v{version}" for version in (entry.from_version, entry.to_version)
        )
        what = f"{entry.action} {'' if entry.candidate is None else f'candidate v{entry.candidate} '}{before} → {after}"
        trail.add_row(str(entry.number), when, entry.by, what, entry.verdict)
    console.print(trail)


def print_warnings(console: Console, warnings: Sequence[str]) -> None:
    """Print a line for each thing that looks wrong."""
    for text in warnings:
        print_line(console, f"warning: {text}")


def print_line(console: Console, text: str) -> None:
    """Print a line that no terminal breaks."""
    # A path that is broken into lines cannot be copied.
    console.print(text, soft_wrap=True, highlight=False)
