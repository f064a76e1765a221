"""Commands that score models on benchmarks, judge what was scored, and fetch benchmarks."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    from evaluation.verdict.gate import Gate
    from evaluation.verdict.report import Evaluated, Setting
    from evaluation.verdict.results import Compared


commands = typer.Typer(rich_markup_mode=None)
_command = partial(commands.command, rich_help_panel=MODEL)

# Exit status of a comparison: shown better (or worse by less than the margin), shown worse, not shown, no comparison.
_STATUS = {"passed": 0, "worse": 1, "not shown": 2}
_INCOMPARABLE = 3
# The columns of a table of scores that may take several lines: the others hold numbers.
_FOLDED = frozenset({"Tasks", "Filter", "Metric"})

Margin = Annotated[float, typer.Option(help="How much worse the first may be, in accuracy; 0: must be better.")]
Confidence = Annotated[float, typer.Option(help="One-sided confidence of the verdict.")]
Metric = Annotated[str | None, typer.Option(help="Metric to compare (default: the first that both have).")]
Filter = Annotated[
    str | None, typer.Option("--filter", help="Filter of lm-eval to compare after (default: the first that both have).")
]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column that says which problems belong together: a text, a subject (default: problems are independent).",
    ),
]


@_command()
def evaluate(
    model: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL_DIR", help="A model directory; with --against two, or the file of a result."),
    ],
    benchmark: Benchmarks,
    *,
    compared: Annotated[
        bool,
        typer.Option(
            "--against", help="Compare problem by problem, the first against the second; exit status as relex gate."
        ),
    ] = False,
    margin: Margin = 0.0,
    confidence: Confidence = 0.95,
    problems: Annotated[int, typer.Option(min=0, help="With --against: show so many problems that differ.")] = 10,
    cluster: Cluster = None,
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
    A stored result: relex evaluate --against predicted/step-500 results/samples_gsm8k.jsonl --benchmark gsm8k
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
    stored = compared and model[1].is_file()
    if stored and len(benchmark) != 1:
        raise typer.BadParameter(f"{len(benchmark)} benchmarks are given and {model[1]} is a result on one")
    if cluster is not None and not stored:
        raise typer.BadParameter("--cluster is for --against the file of a result")
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

    if compared:
        with _refusing(), Bars(err) as bars:
            if stored:
                result = judge_stored(
                    score(model[0])[0], model[1], margin=margin, confidence=confidence, cluster=cluster
                )
            else:
                pairs = compare_pair(
                    model, score, margin=margin, confidence=confidence, looks=cache_directory(cache) / "looks"
                )
        if stored:
            show_compared(result, as_json=as_json)
        elif as_json:
            print_json([each.to_json() for each in pairs])
        else:
            show_versus(out, pairs, problems=problems)
        raise typer.Exit(_status([result.gate] if stored else [each.gate for each in pairs]))
    with Bars(err) as bars:
        scored = score(
            model[0] if logits_from is None or alpha is None else LogitsExtrapolation(logits_from, model[0], alpha)
        )
    if as_json:
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


@_command("gate")
def judge(
    ours: Annotated[Path, typer.Argument(metavar="A", help="A result: a report, samples_*.jsonl, JSONL of id, score.")],
    theirs: Annotated[Path, typer.Argument(metavar="B", help="The result that A is compared with.")],
    *,
    margin: Margin = 0.0,
    confidence: Confidence = 0.95,
    metric: Metric = None,
    filter_name: Filter = None,
    cluster: Cluster = None,
    as_json: Json = False,
) -> None:
    """Judge two stored results problem by problem: is A shown to be better than B, or worse? No model is needed.

    Exit status 0: shown better (with --margin, shown to lose less than that). 1: shown worse. 2: not shown. 3: they
    cannot be compared. A result is relex's report or samples, lm-eval's samples_*.jsonl or the directory they lie in,
    or JSONL with an id and a score in 0..1 a line.

    Example: relex gate new/samples_gsm8k_2026-11-22T10-00-00.jsonl main/samples_gsm8k_2026-11-20T10-00-00.jsonl
    """
    from evaluation.verdict.results import compare, read_result

    with _refusing():
        compared = compare(
            read_result(ours),
            read_result(theirs),
            margin=margin,
            confidence=confidence,
            metric=metric,
            filter_name=filter_name,
            cluster=cluster,
        )
    show_compared(compared, as_json=as_json)
    raise typer.Exit(_status([compared.gate]))


def judge_stored(
    scored: "Evaluated", stored: Path, *, margin: float, confidence: float, cluster: str | None
) -> "Compared":
    """Return the verdict on what was scored now against the result in the file `stored`."""
    from evaluation.verdict.results import compare, read_result, result_of

    reference, report = read_result(stored), scored.report
    ours = (
        result_of(report)
        if reference.kind == "report"
        else read_result(scored.samples, name=report.model, benchmark=report.benchmark)
    )
    # As in the report: the first metric, after the first filter.
    return compare(
        ours,
        reference,
        margin=margin,
        confidence=confidence,
        metric=report.metric,
        filter_name=next(iter(ours.filters), None),
        cluster=cluster,
    )


def show_compared(compared: "Compared", *, as_json: bool) -> None:
    """Print the verdict on two results and, where there was a choice, what was compared."""
    result = compared.gate
    if as_json:
        chosen = {"metric": compared.metric, "filter": compared.filter}
        print_json(asdict(result) | chosen | {"sentence": result.sentence})
        return
    if compared.choice:
        print_line(out, compared.choice)
    print_line(out, result.sentence)


def _status(gates: "Sequence[Gate]") -> int:
    """Return the exit status of all comparisons: one that is worse decides, then one that shows nothing."""
    verdicts = [gate.verdict for gate in gates]
    return _STATUS[next((each for each in ("worse", "not shown") if each in verdicts), "passed")]


@contextmanager
def _refusing() -> "Iterator[None]":
    """Say in one line why nothing can be compared, with a status that is no verdict."""
    from evaluation.errors import EvaluationError

    try:
        yield
    except (EvaluationError, OSError) as error:
        print_line(err, f"relex: {type(error).__name__}: {' '.join(str(error).split())}")
        raise typer.Exit(_INCOMPARABLE) from None


def show_evaluated(console: Console, scored: Sequence["Evaluated"]) -> None:
    """Print scores as lm-eval's command line does, with 95 % intervals, and what else was counted."""
    from evaluation.verdict.export import read_rows

    table = plain_table("Tasks", "Version", "Filter", "n-shot", "Metric", "", "Value", "", "Stderr", "95 %")
    # Ten columns need all of a terminal's 80 characters, and numbers folded into their columns cannot be read.
    table.padding = 0
    for column in table.columns:
        column.no_wrap = column.header not in _FOLDED
    arrows = {True: "↑", False: "↓", None: ""}
    intervals: list[list[str]] = []
    for each in scored:
        name, version = each.report.benchmark, None
        rows = read_rows(each)
        intervals.append(sorted({row.interval_name for row in rows if row.interval_name}))
        for row in rows:
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
    for report, names in zip((each.report for each in scored), intervals, strict=True):
        truncated = f", {100 * report.rates['truncated']:.1f} % cut off" if "truncated" in report.rates else ""
        counted = f"{report.benchmark}: {report.n} problems{truncated}, {report.seconds:,.1f} s in the model"
        print_line(console, counted + (f"; 95 %: {', '.join(names)}" if names else ""))


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
