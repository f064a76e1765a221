"""Commands that score models on benchmarks, and fetch benchmarks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.cli.options import MODEL, Benchmarks, Cache, Json, Limit, cache_directory, err, out, print_json
from flows.console import Bars, plain_table, print_line, print_warnings

if TYPE_CHECKING:
    from evaluation.benchmarks.catalog import CatalogEntry
    from evaluation.verdict.report import Evaluated, Setting


commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=MODEL)


@_command()
def evaluate(
    model: Annotated[list[Path], typer.Argument(metavar="MODEL_DIR", help="A model directory; two with --against.")],
    benchmark: Benchmarks,
    *,
    compared: Annotated[
        bool, typer.Option("--against", help="Compare two models problem by problem, the first against the second.")
    ] = False,
    margin: Annotated[
        float, typer.Option(help="With --against: how much worse the first may be, in accuracy; 0: must be better.")
    ] = 0.0,
    confidence: Annotated[float, typer.Option(help="With --against: one-sided confidence of the verdict.")] = 0.95,
    problems: Annotated[int, typer.Option(min=0, help="With --against: show so many problems that differ.")] = 10,
    logits_from: Annotated[
        Path | None,
        typer.Option(
            metavar="EARLIER_DIR", help="Score two models as one: logits go from this one's to MODEL_DIR's and beyond."
        ),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            help="How far: 1 is MODEL_DIR; for a target step, (target - earlier's) / (MODEL_DIR's - earlier's)."
        ),
    ] = None,
    chat_template: Annotated[
        bool,
        typer.Option("--chat-template", help="Ask in the model's own chat template (@chat behind a name)."),
    ] = False,
    directory: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write results and samples as lm-eval does.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:N, or several workers: cuda:0,cuda:1.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision to run in; auto: the model's own.")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Problems at once (default: 64, with vllm 1024).")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="What answers: hf or vllm, as NAME:parameter=value,… with tensor_parallel_size, "
            "gpu_memory_utilization, max_model_len, share_device."
        ),
    ] = "hf",
    evaluations: Annotated[
        int | None,
        typer.Option(min=1, help="Evaluations at once on each GPU (default: 1), or on the CPU (default: any number)."),
    ] = None,
    limit: Limit = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Score a model on benchmarks; what was scored before is not paid for again.

    Example: relex evaluate predicted/step-500 --benchmark my-benchmark.yaml
    Two models: relex evaluate --against predicted/step-500 runs/qwen/checkpoint-75 --benchmark my-benchmark.yaml
    Eight GPUs: relex evaluate predicted/step-500 --benchmark math --backend vllm:tensor_parallel_size=2
    --device cuda:0,cuda:1,cuda:2,cuda:3,cuda:4,cuda:5,cuda:6,cuda:7
    Logits Extrapolation: relex evaluate runs/qwen/checkpoint-75 --logits-from models/qwen-base --alpha 4 --benchmark …
    """
    from evaluation.answers.fingerprint import LogitsExtrapolation
    from evaluation.answers.harness import evaluate as score_model
    from evaluation.benchmarks.data_directory import CHAT
    from evaluation.verdict.export import export
    from evaluation.verdict.report import Evaluated
    from flows.study.versus import compare_pair, show_versus

    if (logits_from is None) != (alpha is None):
        raise typer.BadParameter("--logits-from and --alpha are given together or not at all")
    if len(model) != (2 if compared else 1):
        raise typer.BadParameter(f"{len(model)} models are given: one, or two with --against")
    if compared and logits_from is not None:
        raise typer.BadParameter("--against is for two directories, without --logits-from")
    names = [name if not chat_template or name.endswith(CHAT) else name + CHAT for name in benchmark]

    def score(subject: Path | LogitsExtrapolation) -> list[Evaluated]:
        scored = score_model(
            subject,
            names,
            cache=cache_directory(cache) / "evaluations",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            limit=limit,
            backend=backend,
            evaluations=evaluations,
            details=True,
            on_progress=lambda step: bars(
                f"{Path(str(subject)).name} {step.benchmark}" if compared else step.benchmark,
                step.done,
                step.total,
                step.pace,
            ),
        )
        for path in export(scored, directory) if directory is not None else []:
            print_line(err, f"wrote {path}")
        return scored

    with Bars(err) as bars:
        if compared:
            pairs = compare_pair(
                model, score, margin=margin, confidence=confidence, looks=cache_directory(cache) / "looks"
            )
        elif logits_from is None or alpha is None:
            scored = score(model[0])
        else:
            scored = score(LogitsExtrapolation(logits_from, model[0], alpha))
    if compared and as_json:
        print_json([each.to_json() for each in pairs])
    elif compared:
        show_versus(out, pairs, problems=problems)
    elif as_json:
        print_json(
            [
                asdict(each.report)
                | {
                    "accuracy": each.report.accuracy,
                    "standard_error": each.report.standard_error,
                    "interval": each.report.interval,
                }
                for each in scored
            ]
        )
    else:
        show_evaluated(out, scored)


def show_evaluated(console: Console, scored: Sequence["Evaluated"]) -> None:
    """Print scores as lm-eval's command line does, with 95 % intervals, and what else was counted."""
    from evaluation.verdict.export import read_rows

    table = plain_table("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", "95 %")
    # Ten columns need all of a terminal's 80 characters.
    table.padding = 0
    arrows = {True: "↑", False: "↓", None: ""}
    for each in scored:
        name, version = each.report.benchmark, None
        for row in read_rows(each):
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
    for report in (each.report for each in scored):
        truncated = f", {100 * report.rates['truncated']:.1f} % cut off" if "truncated" in report.rates else ""
        print_line(console, f"{report.benchmark}: {report.n} problems{truncated}, {report.seconds:,.1f} s in the model")


benchmarks = typer.Typer(rich_markup_mode=None)
commands.add_typer(benchmarks, name="benchmarks", rich_help_panel=MODEL)


@benchmarks.callback(invoke_without_command=True)
def list_benchmarks(context: typer.Context, as_json: Json = False) -> None:
    """List the benchmarks that can be named: what each measures, how, and whether its problems are here.

    Fetched ones lie in the user's data directory, or where RELEX_BENCHMARKS says. With @chat behind its name a
    benchmark is asked in the model's own chat template.

    Example: relex benchmarks
    """
    if context.invoked_subcommand is None:
        from evaluation.benchmarks.catalog import catalog

        _show_benchmarks(catalog(), as_json=as_json)


@benchmarks.command("fetch")
def fetch_benchmarks(
    name: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Shipped, or a task of lm-eval (default: shipped).")
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(help="Directory of lm-eval task YAMLs to look in first; may be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Fetch the problems of benchmarks from the Hub, once; everything after that runs offline.

    The manifest.json of another machine, copied here, brings the same bytes or a refusal.

    Example: relex benchmarks fetch math_select math_gate gsm8k
    """
    from evaluation.benchmarks.catalog import entry
    from evaluation.benchmarks.data_directory import shipped_benchmarks
    from evaluation.benchmarks.fetch import fetch

    names = list(dict.fromkeys(name or shipped_benchmarks()))
    for each in names:
        with err.status(f"fetching {each}"):
            fetch(each, include=include_path or [])
    _show_benchmarks([entry(each) for each in names], as_json=as_json)


def _show_benchmarks(entries: "list[CatalogEntry]", *, as_json: bool) -> None:
    if as_json:
        print_json([asdict(entry) for entry in entries])
    else:
        show_benchmarks(out, entries)


def show_benchmarks(console: Console, entries: Sequence["CatalogEntry"]) -> None:
    """Print what each benchmark measures and how, and where its problems lie."""
    table = plain_table("benchmark", "problems", "measures", "samples; tokens", "fetched")
    for entry in entries:
        count = "?" if entry.problems is None else f"{entry.problems:,}"
        table.add_row(entry.name, count, entry.measures, _generated(entry.settings), entry.commit[:7] or "no")
    console.print(table)
    for place in dict.fromkeys(str(Path(entry.directory).parent) for entry in entries if entry.directory):
        print_line(console, f"fetched benchmarks lie in {place}")
    print_warnings(
        console,
        [
            f"{entry.left_out} rows of {entry.hub} have no answer to grade by and are not in {entry.name}"
            for entry in entries
            if entry.left_out
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
