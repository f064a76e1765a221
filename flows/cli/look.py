"""Commands that look at a training run."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.cli.options import EVERY_METHOD, RUN, STUDY, Base, Json, ListsMethods, Reading, Run, grouped, out, print_json
from flows.console import plain_table, print_line, print_warnings

if TYPE_CHECKING:
    from flows.study.analyze import Analyzed
    from relex.backtest.backtest import Backtest
    from relex.inspection import Inspection

commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=RUN)

# Of a long run the first and last steps say what a reader needs; --json has them all.
_ROWS = 12


@_command()
@grouped
def inspect(run: Run, base: Base, reading: Reading, as_json: Json = False) -> None:
    """Show the steps of a training run, the state of each, and how straight the trajectory is.

    Example: relex inspect runs/qwen --base models/qwen-base
    """
    from relex.inspection import inspect as inspect_run
    from relex.progress import telling

    with reading.session() as (bars, blocks):
        inspection = inspect_run(
            run,
            base,
            grams=reading.grams,
            memory=reading.memory,
            threads=reading.threads,
            window=reading.window,
            blocks=blocks,
            on_progress=telling(bars, "reading"),
        )
    if as_json:
        print_json(asdict(inspection))
    else:
        show_inspection(out, inspection)


def show_inspection(console: Console, inspection: "Inspection") -> None:
    """Print the steps of a training run and how straight it is."""
    from relex.store import State

    steps = inspection.steps
    console.print(
        f"{inspection.run}: {len(steps)} steps, {inspection.tensors} tensors, {inspection.parameters:,} parameters"
    )
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
    print_warnings(console, [finding.text for finding in inspection.findings])
    if inspection.straightness is None:
        console.print("fewer than 2 checkpoints are ready: nothing to fit")
        return
    console.print(
        f"rank-1 energy {inspection.straightness.energy:.3f}, R² of the leading coordinate on the step"
        f" {inspection.straightness.r_squared:.3f} (both weighted by the size of the deltas)"
    )


@_command(cls=ListsMethods)
@grouped
def backtest(
    run: Run,
    base: Base,
    reading: Reading,
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Method to test beside the usual ones; may be repeated, as {EVERY_METHOD}"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell from the observed steps how far the run can be trusted to extrapolate, and how best, or say hold.

    Example: relex backtest runs/qwen --base models/qwen-base
    """
    from relex.backtest.backtest import backtest_run
    from relex.progress import telling

    with reading.session() as (bars, blocks):
        tested = backtest_run(
            run,
            base,
            grams=reading.grams,
            memory=reading.memory,
            threads=reading.threads,
            window=reading.window,
            methods=method or (),
            blocks=blocks,
            on_progress=telling(bars, "reading"),
        )
    if as_json:
        print_json(tested.to_json())
    else:
        show_backtest(out, tested)


def show_backtest(console: Console, tested: "Backtest") -> None:
    """Print the skill of every form by horizon, for windows that begin where the recommended one does."""
    advice = tested.recommendation
    # --json has all windows; where nothing is recommended the whole one is what a reader would have used.
    start = advice.way.start if advice.way is not None else 0.0
    shown = [cell for cell in tested.cells if cell.way.start == start]
    horizons = sorted({cell.horizon for cell in shown})
    table = plain_table("method", *(f"{horizon:g} x" for horizon in horizons))
    for method in tested.methods if shown else ():
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
    first, last = tested.steps[0], tested.steps[-1]
    console.print(
        f"{len(tested.steps)} checkpoints, steps {first} to {last}; skill against holding the latest"
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


@_command(rich_help_panel=STUDY)
@grouped
def analyze(
    run: Run,
    base: Base,
    reading: Reading,
    *,
    directory: Annotated[Path, typer.Option("--out", help="Directory for numbers and figures.")] = Path("analysis"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample of weights.")] = 0,
    responses: Annotated[
        Path | None,
        typer.Option(help='JSONL of {"prompt", "response"}: also how their log-probabilities move, token by token.'),
    ] = None,
    device: Annotated[str, typer.Option(help="Device for log-probabilities: cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision of log-probabilities; auto: the model's own.")] = "auto",
    as_json: Json = False,
) -> None:
    """Analyze how a run moves: energy and R² by layer and module, coordinates, single weights, log-probabilities.

    Example: relex analyze runs/qwen --base models/qwen-base --out analysis
    """
    from flows.study.analyze import analyze as analyze_run
    from flows.study.resources import Resources

    with reading.session() as (bars, blocks):
        analyzed = analyze_run(
            run,
            base,
            Resources(reading.memory, reading.threads, reading.kept, blocks, bars),
            out=directory,
            window=reading.window,
            seed=seed,
            responses=responses,
            device=device,
            dtype=dtype,
        )
    if as_json:
        print_json(analyzed.to_json())
    else:
        show_analysis(out, analyzed, directory)


def show_analysis(console: Console, analyzed: "Analyzed", directory: Path) -> None:
    """Print how straight a run is by module type."""
    from flows.study.analyze import HEADINGS, cells, described

    analysis = analyzed.analysis
    console.print(plain_table(*HEADINGS, rows=map(cells, (*analysis.modules, analysis.whole))))
    print_warnings(console, analysis.warnings)
    console.print(described("weights", analysis.whole.weights), highlight=False)
    if analyzed.tokens is not None:
        console.print(described("token log-probabilities", analyzed.tokens), highlight=False)
    print_line(console, f"more, and figures: {directory / 'analysis.md'}")
