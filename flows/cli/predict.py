"""Commands that predict later checkpoints, and compare what the methods make of a run."""

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.cli.options import (
    EVERY_METHOD,
    MODEL,
    STUDY,
    Base,
    Benchmarks,
    Json,
    Limit,
    ListsMethods,
    Reading,
    Run,
    TargetSteps,
    grouped,
    out,
    print_json,
)
from flows.console import plain_table, print_fitting, print_line, print_warnings

if TYPE_CHECKING:
    from flows.study.comparison import Comparison
    from relex.output.manifest import Manifest

commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=STUDY)


@_command()
def methods(as_json: Json = False) -> None:
    """List the methods: parameters with their defaults, the paper, and whether a backtest tests them.

    Example: relex methods
    """
    from relex.predictors import METHODS

    if as_json:
        print_json(
            {
                name: {
                    "summary": row.summary,
                    "parameters": {parameter: read.__name__ for parameter, read in row.parameters.items()},
                    "defaults": row.defaults,
                    "paper": row.paper,
                    "backtest": row.backtest,
                    "why": row.why,
                }
                for name, row in METHODS.items()
            }
        )
        return
    table = plain_table("method", "what it does", "backtest")
    for name, row in METHODS.items():
        # A parameter a line: side by side they would leave the words no room on a terminal.
        parameters = [f"  {parameter}" for parameter in row.written.split(",") if parameter]
        source = f" (arXiv {row.paper})" if row.paper else ""
        tested = f"{row.backtest}: {row.why}" if row.why else row.backtest
        table.add_row("\n".join([name, *parameters]), row.summary + source, tested)
    out.print(table)


@_command(cls=ListsMethods, rich_help_panel=MODEL)
@grouped
def extrapolate(
    run: Run,
    base: Base,
    target_step: TargetSteps,
    destination: Annotated[str, typer.Option("--out", help="Directory or URL to put step-N directories in.")],
    reading: Reading,
    *,
    method: Annotated[str, typer.Option(help=f"Method, as {EVERY_METHOD}")] = "relex",
    rank: Annotated[int | None, typer.Option(min=1, help="Short for the method's parameter rank.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the output: float32, float16 or bfloat16 (default: the base's).")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run of LoRA adapters: write adapters instead of whole models.")
    ] = False,
    allow_inside: Annotated[
        bool, typer.Option("--allow-inside", help="Allow a target inside the window, to look at the fit itself.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Predict checkpoints from the observed ones and write them as model directories.

    Example: relex extrapolate runs/qwen --base models/qwen-base --window 75 --target-step 500 --out predicted
    """
    from relex.extrapolation import extrapolate_run
    from relex.predictors import parse_method

    if rank is not None:
        method += f"{',' if ':' in method else ':'}rank={rank}"
    with reading.session() as (bars, blocks):
        manifests = extrapolate_run(
            run,
            base,
            targets=list(dict.fromkeys(target_step)),
            out=destination,
            window=reading.window,
            method=parse_method(method),
            memory=reading.memory,
            threads=reading.threads,
            dtype=dtype,
            form="adapter" if adapter else "model",
            inside="allow" if allow_inside else "refuse",
            grams=reading.grams,
            staging=reading.kept / "staging",
            blocks=blocks,
            command=sys.argv,
            tell=bars,
        )
    if as_json:
        print_json([manifest.to_json() for manifest in manifests.values()])
    else:
        show_extrapolation(out, manifests)


def show_extrapolation(console: Console, manifests: "Mapping[str, Manifest]") -> None:
    """Print what was predicted and how far it is from what was seen."""
    columns = ["predicted", "‖Δ‖ vs latest", "norm band 90 %", "Σ|c| at most"]
    if any(manifest.adapter is not None for manifest in manifests.values()):
        columns += ["rank at most", "error at most"]
    table = plain_table(*columns)
    for location, manifest in manifests.items():
        made = manifest.forecast
        latest = made.norm_latest or 1.0
        band = f"{made.norm_band[0] / latest:.2f} – {made.norm_band[1] / latest:.2f}" if made.norm_band else "—"
        row = [location, f"{made.norm / latest:.2f} x", band, f"{made.amplification:.1f}"]
        if manifest.adapter is not None:
            row += [str(manifest.adapter.rank), f"{manifest.adapter.error:.1e}"]
        table.add_row(*row)
    first = next(iter(manifests.values())).forecast
    console.print(
        f"{first.method} from {len(first.steps)} checkpoints, steps {first.steps[0]} to {first.steps[-1]}:"
        f" rank-1 energy {first.energy:.3f}, R² {first.r_squared:.3f}"
    )
    for family in first.description["family"].values():
        if "told_by" in family:
            console.print(f"learning rate {family['lr']:g}, from {family['told_by']}")
    print_warnings(console, first.warnings)
    if first.copied:
        others = ", …" if len(first.copied) > 1 else ""
        console.print(
            f"{first.method} does not apply to {len(first.copied)} tensors, {first.copied_share:.1%} of the parameters:"
            f" they are the latest checkpoint's ({first.copied[0]}{others})"
        )
    console.print(table)


@_command(cls=ListsMethods)
@grouped
def compare(
    run: Run,
    base: Base,
    benchmark: Benchmarks,
    target_step: TargetSteps,
    reading: Reading,
    *,
    method: Annotated[
        list[str] | None,
        typer.Option(help=f"Method; may be repeated (default: relex), as {EVERY_METHOD}"),
    ] = None,
    directory: Annotated[Path, typer.Option("--out", help="Directory for models, table and figure.")] = Path("compare"),
    logits: Annotated[
        bool, typer.Option("--logits", help="Add Logits Extrapolation, of base and last observed.")
    ] = False,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Add observed steps, projected and as the fit reads them.")
    ] = False,
    device: Annotated[str, typer.Option(help="Device for evaluation: cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision of evaluation; auto: the model's own.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Problems at once.")] = 64,
    limit: Limit = None,
    as_json: Json = False,
) -> None:
    """Compare methods at the same observed steps: accuracy, nearness to the real later checkpoints, cost.

    Example: relex compare runs/qwen --base models/qwen-base --benchmark my-benchmark.yaml --window 75
    --target-step 200 --target-step 500 --method relex --method raw --method expo
    """
    from flows.cli.gates import refuse_gates
    from flows.study.compare import Plan, Scoring
    from flows.study.compare import compare as compare_methods
    from flows.study.resources import Resources
    from relex.predictors import parse_method

    methods = {parsed.spec: parsed for parsed in map(parse_method, method or ["relex"])}
    targets = tuple(sorted(set(target_step)))
    plan = Plan(tuple(methods.values()), targets, window=reading.window, logits=logits, reconstruct=reconstruct)
    names = tuple(dict.fromkeys(benchmark))
    refuse_gates(run, names)
    scoring = Scoring(names, device=device, dtype=dtype, batch_size=batch_size, limit=limit)
    with reading.session() as (bars, blocks):
        comparison = compare_methods(
            run,
            base,
            plan,
            scoring,
            Resources(reading.memory, reading.threads, reading.kept, blocks, bars),
            out=directory,
        )
    if as_json:
        print_json(comparison.to_json())
    else:
        show_comparison(out, comparison, directory)


def show_comparison(console: Console, comparison: "Comparison", directory: Path) -> None:
    """Print every model that was compared, by step."""
    from flows.study.comparison import cells, headings

    names, rows = headings(comparison), [cells(row) for row in comparison.rows]

    console.print(comparison.summary)
    print_warnings(console, comparison.warnings)
    console.print("; ".join(f"{score.benchmark}: {score.n} problems" for score in comparison.scored), highlight=False)
    # Accuracy first, then nearness and cost.
    scores = 2 + 2 * len(comparison.scored)
    print_fitting(console, names, rows, range(scores), [0, 1, *range(scores, len(names))])
    print_line(console, f"more, and a figure: {directory / 'compare.md'}")
