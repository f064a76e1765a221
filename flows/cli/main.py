"""The command line: `relex …`. Exit status 0 done, 1 refused or failed with one line, 2 usage."""

import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console

from deploy.errors import DeployError
from evaluation.errors import EvaluationError
from flows.errors import ConfigError, FlowError
from relex.errors import RelexError

if TYPE_CHECKING:
    from evaluation.benchmarks.catalog import Entry
    from flows.promote.promotion import Promotion

app = typer.Typer(
    name="relex",
    help="Predict later checkpoints of an RLVR training run, test them, and register the one worth having.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()
err = Console(stderr=True)


def _memory(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise typer.BadParameter(f"{text!r} is not a size; write 4GiB or 512MiB") from None


Run = Annotated[str, typer.Argument(metavar="RUN", help="Directory or URL the trainer writes its checkpoints to.")]
Base = Annotated[str, typer.Option(help="Directory or URL of the model the run started from.", show_default=False)]
Memory = Annotated[int, typer.Option(parser=_memory, metavar="SIZE", help="Memory for reading and combining.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads for reading and combining.")]
Window = Annotated[int | None, typer.Option(min=1, help="Use checkpoints up to this training step (default: all).")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Home = Annotated[
    Path, typer.Option(envvar="RELEX_HOME", help="Where the local stack keeps its state.", show_default="~/.relex")
]
Cache = Annotated[
    Path | None, typer.Option(help="Where what was measured is kept for the next call (default: the user's cache).")
]
CacheSize = Annotated[
    int, typer.Option(parser=_memory, metavar="SIZE", help="Disk for what is read from a URL, until it has been read.")
]

CORES = os.cpu_count() or 1
HOME = Path.home() / ".relex"
FOUR_GIB = "4GiB"
EIGHT_GIB = "8GiB"


@app.command()
def inspect(
    run: Run,
    base: Base,
    window: Window = None,
    memory: Memory = FOUR_GIB,  # type: ignore[assignment]
    threads: Threads = CORES,
    cache: Cache = None,
    cache_size: CacheSize = EIGHT_GIB,  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Show the steps of a training run, the state of each, and how straight the trajectory is.

    Example: relex inspect runs/qwen --base models/qwen-base
    """
    from flows import console
    from relex.files.block_cache import BlockCache
    from relex.inspection import inspect as look

    with console.Bars(err) as bars, BlockCache(_cache(cache), size=cache_size) as blocks:
        found = look(
            run,
            base,
            grams=_cache(cache) / "grams",
            memory=memory,
            threads=threads,
            window=window,
            blocks=blocks,
            on_progress=lambda done, total: bars("reading", done, total),
        )
    if as_json:
        _print_json(asdict(found))
    else:
        console.show_inspection(out, found)


@app.command()
def extrapolate(
    run: Run,
    base: Base,
    target_step: Annotated[list[int], typer.Option(help="Training step to predict; may be given several times.")],
    destination: Annotated[str, typer.Option("--out", help="Directory or URL to put step-N directories in.")],
    window: Window = None,
    method: Annotated[str, typer.Option(help="Method, as NAME or NAME:parameter=value,….")] = "relex",
    rank: Annotated[int | None, typer.Option(min=1, help="Short for the method's parameter rank.")] = None,
    memory: Memory = FOUR_GIB,  # type: ignore[assignment]
    threads: Threads = CORES,
    dtype: Annotated[
        str | None, typer.Option(help="Precision of the output: float32, float16 or bfloat16 (default: the base's).")
    ] = None,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="Of a run of LoRA adapters: write adapters instead of whole models.")
    ] = False,
    allow_inside: Annotated[
        bool, typer.Option("--allow-inside", help="Allow a target inside the window, to look at the fit itself.")
    ] = False,
    cache: Cache = None,
    cache_size: CacheSize = EIGHT_GIB,  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Predict checkpoints from the observed ones and write them as model directories.

    Example: relex extrapolate runs/qwen --base models/qwen-base --window 75 --target-step 500 --out predicted
    """
    from flows import console
    from relex.extrapolation import extrapolate_run
    from relex.files.block_cache import BlockCache
    from relex.predictors import parse_method

    if rank is not None:
        method += f"{',' if ':' in method else ':'}rank={rank}"
    kept = _cache(cache)
    with console.Bars(err) as bars, BlockCache(kept, size=cache_size) as blocks:
        manifests = extrapolate_run(
            run,
            base,
            targets=list(dict.fromkeys(target_step)),
            out=destination,
            window=window,
            method=parse_method(method),
            memory=memory,
            threads=threads,
            dtype=dtype,
            form="adapter" if adapter else "model",
            inside="allow" if allow_inside else "refuse",
            grams=kept / "grams",
            staging=kept / "staging",
            blocks=blocks,
            command=sys.argv,
            tell=bars,
        )
    if as_json:
        _print_json([manifest.to_json() for manifest in manifests.values()])
    else:
        console.show_extrapolation(out, manifests)


@app.command()
def backtest(
    run: Run,
    base: Base,
    window: Window = None,
    memory: Memory = FOUR_GIB,  # type: ignore[assignment]
    threads: Threads = CORES,
    cache: Cache = None,
    cache_size: CacheSize = EIGHT_GIB,  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Tell from the observed steps how far the run can be trusted to extrapolate, and how best, or say hold.

    Example: relex backtest runs/qwen --base models/qwen-base
    """
    from flows import console
    from relex.backtest.backtest import backtest_run
    from relex.files.block_cache import BlockCache

    with console.Bars(err) as bars, BlockCache(_cache(cache), size=cache_size) as blocks:
        found = backtest_run(
            run,
            base,
            grams=_cache(cache) / "grams",
            memory=memory,
            threads=threads,
            window=window,
            blocks=blocks,
            on_progress=lambda done, total: bars("reading", done, total),
        )
    if as_json:
        _print_json(asdict(found))
    else:
        console.show_backtest(out, found)


@app.command()
def compare(
    run: Run,
    base: Base,
    benchmark: Annotated[list[str], typer.Option(help="Benchmark: a shipped name or a YAML file; may be repeated.")],
    target_step: Annotated[list[int], typer.Option(help="Training step to predict; may be given several times.")],
    window: Window = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Method, as NAME or NAME:parameter=value,…; may be repeated (default: relex)."),
    ] = None,
    directory: Annotated[Path, typer.Option("--out", help="Directory for models, table and figure.")] = Path("compare"),
    logits: Annotated[
        bool, typer.Option("--logits", help="Add Logits Extrapolation, of base and last observed.")
    ] = False,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Add observed steps, projected and as the fit reads them.")
    ] = False,
    memory: Memory = FOUR_GIB,  # type: ignore[assignment]
    threads: Threads = CORES,
    device: Annotated[str, typer.Option(help="Device for evaluation: cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision of evaluation; auto: the model's own.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Problems at once.")] = 64,
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first problems.")] = None,
    cache: Cache = None,
    cache_size: CacheSize = EIGHT_GIB,  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Compare methods at the same observed steps: accuracy, nearness to the real later checkpoints, cost.

    Example: relex compare runs/qwen --base models/qwen-base --benchmark my-benchmark.yaml --window 75
    --target-step 200 --target-step 500 --method relex --method raw --method expo
    """
    from flows import console
    from flows.study.compare import Plan, Scoring
    from flows.study.compare import compare as run_all
    from relex.files.block_cache import BlockCache
    from relex.predictors import parse_method

    kept = _cache(cache)
    methods = {found.spec: found for found in map(parse_method, method or ["relex"])}
    targets = tuple(sorted(set(target_step)))
    plan = Plan(tuple(methods.values()), targets, window=window, logits=logits, reconstruct=reconstruct)
    names = tuple(dict.fromkeys(benchmark))
    scoring = Scoring(names, device=device, dtype=dtype, batch_size=batch_size, limit=limit)
    with console.Bars(err) as bars, BlockCache(kept, size=cache_size) as blocks:
        found = run_all(
            run,
            base,
            plan,
            scoring,
            out=directory,
            memory=memory,
            threads=threads,
            cache=kept,
            blocks=blocks,
            tell=bars,
        )
    if as_json:
        _print_json(found.to_json())
    else:
        console.show_comparison(out, found, directory)


@app.command()
def analyze(
    run: Run,
    base: Base,
    window: Window = None,
    directory: Annotated[Path, typer.Option("--out", help="Directory for numbers and figures.")] = Path("analysis"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sample of weights.")] = 0,
    responses: Annotated[
        Path | None,
        typer.Option(help='JSONL of {"prompt", "response"}: also how their log-probabilities move, token by token.'),
    ] = None,
    memory: Memory = FOUR_GIB,  # type: ignore[assignment]
    threads: Threads = CORES,
    device: Annotated[str, typer.Option(help="Device for log-probabilities: cpu, cuda or cuda:N.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Precision of log-probabilities; auto: the model's own.")] = "auto",
    cache: Cache = None,
    cache_size: CacheSize = EIGHT_GIB,  # type: ignore[assignment]
    as_json: Json = False,
) -> None:
    """Analyze how a run moves: energy and R² by layer and module, coordinates, single weights, log-probabilities.

    Example: relex analyze runs/qwen --base models/qwen-base --out analysis
    """
    from flows import console
    from flows.study.analyze import analyze as look
    from relex.files.block_cache import BlockCache

    kept = _cache(cache)
    with console.Bars(err) as bars, BlockCache(kept, size=cache_size) as blocks:
        found = look(
            run,
            base,
            out=directory,
            window=window,
            seed=seed,
            responses=responses,
            device=device,
            dtype=dtype,
            memory=memory,
            threads=threads,
            cache=kept,
            blocks=blocks,
            tell=bars,
        )
    if as_json:
        _print_json(found.to_json())
    else:
        console.show_analysis(out, found, directory)


@app.command()
def evaluate(
    model: Annotated[list[Path], typer.Argument(metavar="MODEL_DIR", help="A model directory; two with --compare.")],
    benchmark: Annotated[list[str], typer.Option(help="Benchmark: a shipped name or a YAML file; may be repeated.")],
    compared: Annotated[
        bool, typer.Option("--compare", help="Compare two models problem by problem, the first against the second.")
    ] = False,
    margin: Annotated[
        float, typer.Option(help="With --compare: how much worse the first may be, in accuracy; 0: must be better.")
    ] = 0.0,
    confidence: Annotated[float, typer.Option(help="With --compare: one-sided confidence of the verdict.")] = 0.95,
    problems: Annotated[int, typer.Option(min=0, help="With --compare: show so many problems that differ.")] = 10,
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
    limit: Annotated[int | None, typer.Option(min=1, help="Score only the first problems.")] = None,
    cache: Cache = None,
    as_json: Json = False,
) -> None:
    """Score a model on benchmarks; what was scored before is not paid for again.

    Example: relex evaluate predicted/step-500 --benchmark my-benchmark.yaml
    Two models: relex evaluate --compare predicted/step-500 runs/qwen/checkpoint-75 --benchmark my-benchmark.yaml
    Eight GPUs: relex evaluate predicted/step-500 --benchmark math --backend vllm:tensor_parallel_size=2
    --device cuda:0,cuda:1,cuda:2,cuda:3,cuda:4,cuda:5,cuda:6,cuda:7
    Logits Extrapolation: relex evaluate runs/qwen/checkpoint-75 --logits-from models/qwen-base --alpha 4 --benchmark …
    """
    from evaluation.answers.fingerprint import LogitsExtrapolation
    from evaluation.answers.harness import evaluate_in_detail
    from evaluation.benchmarks.fetched import CHAT
    from evaluation.verdict.export import export
    from evaluation.verdict.report import Evaluated
    from flows import console
    from flows.study.versus import compare_pair, show_versus

    if (logits_from is None) != (alpha is None):
        raise typer.BadParameter("--logits-from and --alpha are given together or not at all")
    if len(model) != (2 if compared else 1):
        raise typer.BadParameter(f"{len(model)} models are given: one, or two with --compare")
    if compared and logits_from is not None:
        raise typer.BadParameter("--compare is for two directories, without --logits-from")
    names = [name if not chat_template or name.endswith(CHAT) else name + CHAT for name in benchmark]

    def score(subject: Path | LogitsExtrapolation) -> list[Evaluated]:
        found = evaluate_in_detail(
            subject,
            names,
            cache=_cache(cache) / "evaluations",
            device=device,
            dtype=dtype,
            batch_size=batch_size,
            limit=limit,
            backend=backend,
            evaluations=evaluations,
            on_progress=lambda step: bars(
                f"{Path(str(subject)).name} {step.benchmark}" if compared else step.benchmark,
                step.done,
                step.total,
                step.pace,
            ),
        )
        for path in export(found, directory) if directory is not None else []:
            err.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
        return found

    with console.Bars(err) as bars:
        if compared:
            pairs = compare_pair(model, score, margin=margin, confidence=confidence)
        elif logits_from is None or alpha is None:
            scored = score(model[0])
        else:
            scored = score(LogitsExtrapolation(logits_from, model[0], alpha))
    if compared and as_json:
        _print_json([each.to_json() for each in pairs])
    elif compared:
        show_versus(out, pairs, problems=problems)
    elif as_json:
        _print_json(
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
        console.show_evaluated(out, scored)


benchmarks = typer.Typer(rich_markup_mode=None)
app.add_typer(benchmarks, name="benchmarks")


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
    from evaluation.benchmarks.fetch import fetch
    from evaluation.benchmarks.fetched import shipped_benchmarks

    names = list(dict.fromkeys(name or shipped_benchmarks()))
    for each in names:
        with err.status(f"fetching {each}"):
            fetch(each, include=include_path or [])
    _show_benchmarks([entry(each) for each in names], as_json=as_json)


def _show_benchmarks(found: "list[Entry]", *, as_json: bool) -> None:
    from flows import console

    if as_json:
        _print_json([asdict(item) for item in found])
    else:
        console.show_benchmarks(out, found)


@app.command()
def watch(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A relex.yaml.")],
    home: Home = HOME,
    seconds: Annotated[float, typer.Option(help="Stop after this long (default: when interrupted).")] = float("inf"),
    as_json: Json = False,
) -> None:
    """Watch one training run in the foreground and announce what is due to the running stack.

    Example: relex watch relex.yaml
    """
    from deploy.local import stack
    from flows import console
    from flows.settings import load_settings

    settings = load_settings(config)
    os.environ.update(stack.environment(stack.running(home)))
    from flows.watch.watcher import watch_store

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    if as_json:
        watch_store(settings, seconds=seconds, on_look=console.JsonLines())
        return
    with err.status("looking") as status:
        watch_store(settings, seconds=seconds, on_look=lambda _, text: status.update(text))


@app.command()
def reground(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The YAML of a re-grounding.")],
    on_stack: Annotated[
        bool, typer.Option("--stack", help="Show it on the pages of the running stack, as a flow run of this process.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Alternate real steps, by your own trainer, with jumps; each is judged, and the next steps start from the better.

    Killed at any moment, the same command goes on where it was.
    Example: relex reground reground.yaml
    """
    import signal

    from flows import console
    from flows.reground.loop import reground as run_cycles
    from flows.reground.page import show
    from flows.reground.settings import load_reground_settings

    # Asked to end, it ends its trainer first, as when interrupted at the terminal.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    settings = load_reground_settings(config)
    if on_stack:
        from deploy.local import stack

        os.environ.update(stack.environment(stack.running(home)))
        from flows.reground.flow import reground as run_flow

        run_flow(str(config))
    with console.Bars(err) as bars:
        found = run_cycles(settings, tell=bars)
    if as_json:
        _print_json(found.to_json())
    else:
        show(out, found)


@app.command()
def up(
    config: Annotated[list[Path] | None, typer.Argument(metavar="[CONFIG]...", help="Training runs to watch.")] = None,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Start the local stack: Prefect server, MLflow server, and for each CONFIG its watcher and deployments.

    What runs is left alone, what died is started again. Where the home has a file auth, one line user:password, both
    servers ask for it.
    Example: relex up relex.yaml
    """
    from deploy.local import stack
    from evaluation.benchmarks.benchmark import resolve_benchmark
    from flows.processes import revive_promoter, revive_watchers, spawn_watcher
    from flows.settings import load_settings

    configs: dict[str, Path] = {}
    for path in config or []:
        settings = load_settings(path)
        if (other := configs.get(settings.training_run, path)) != path:
            raise ConfigError(
                f"{other} and {path} both describe training run {settings.training_run}. Give one of them another name."
            )
        for benchmark in (settings.selection, settings.gate, *settings.report):
            resolve_benchmark(benchmark)
        configs[settings.training_run] = path
    with err.status("starting the servers"):
        started = stack.up(home)
        for name, path in configs.items():
            spawn_watcher(started, name, path)
        revive_watchers(started)
        revive_promoter(started)
    _show_stack(home, as_json=as_json)


@app.command()
def down(home: Home = HOME, as_json: Json = False) -> None:
    """Stop the local stack, watchers first.

    Example: relex down
    """
    from deploy.local import stack
    from flows import console

    with err.status("stopping"):
        services = stack.down(home)
    if as_json:
        _print_json([asdict(item) for item in services])
    else:
        console.show_services(out, services)


@app.command()
def status(home: Home = HOME, as_json: Json = False) -> None:
    """Show what of the local stack is running, and where.

    Example: relex status
    """

    _show_stack(home, as_json=as_json)


def _show_stack(home: Path, *, as_json: bool) -> None:
    from deploy.local import stack
    from flows import console

    services = stack.status(home)
    if as_json:
        _print_json([asdict(item) for item in services])
    else:
        console.show_services(out, services)


@app.command()
def stop(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A relex.yaml.")],
    confirm: Annotated[bool, typer.Option("--confirm", help="Do it; without this it is only shown.")] = False,
    beyond_trust: Annotated[
        bool, typer.Option("--beyond-trust", help="Also on a prediction beyond what the backtest trusts.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Although it was done before, or may have been: see what is shown.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Show whether the training can be stopped, how, and how many steps that saves; with --confirm, stop it, once.

    Example: relex stop relex.yaml --confirm
    """
    import psutil

    from deploy.local import stack
    from flows.settings import load_settings
    from flows.stop import status
    from flows.stop.execute import log_stop

    if (beyond_trust or again) and not confirm:
        raise typer.BadParameter("--beyond-trust and --again go with --confirm")
    settings = load_settings(config)
    found = status.outlook(config, settings)
    if confirm:
        done = status.confirm(
            settings,
            found,
            by=psutil.Process().username(),
            beyond_trust="allow" if beyond_trust else "refuse",
            again="allow" if again else "refuse",
        )
        log_stop(settings, done, tracking_uri=stack.tracking_uri(home))
        found = status.outlook(config, settings)
    if as_json:
        _print_json(found.to_json())
    else:
        out.print(found.sentence, markup=False, highlight=False, soft_wrap=True)


@app.command()
def drift(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A relex.yaml.")],
    as_json: Json = False,
) -> None:
    """Show what was predicted next to what the run has reached since; what is missing is compared now, without servers.

    Example: relex drift relex.yaml
    """
    from flows import console
    from flows.drift.measure import catch_up
    from flows.drift.page import show, to_json
    from flows.settings import load_settings
    from relex.files.block_cache import BlockCache

    settings = load_settings(config)
    with console.Bars(err) as bars, BlockCache(settings.home, size=int(settings.cache)) as blocks:
        rows, waiting = catch_up(settings, blocks=blocks, tell=bars)
    if as_json:
        _print_json(to_json(settings.training_run, rows, waiting))
    else:
        show(out, rows, waiting)


@app.command()
def models(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Name of the registered model (default: all).")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read every byte of the weights (default: compare sizes).")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """List registered predictions: step, verdict, gate, champion, whether the weights are whole and where they lie.

    Example: relex models qwen
    """
    from deploy import registry
    from deploy.local import stack
    from flows import console
    from flows.promote.listing import listing

    uri = stack.tracking_uri(home)
    found = [
        listing(item, tracking_uri=uri, downloads=home / "models", contents="read" if verify else "sizes")
        for item in ([name] if name is not None else registry.names(tracking_uri=uri))
    ]
    if as_json:
        _print_json([item.to_json() for item in found])
        return
    if not found:
        out.print("nothing is registered")
    for item in found:
        console.show_models(out, item)


@app.command()
def promote(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model.")],
    version: Annotated[
        int | None, typer.Argument(metavar="[VERSION]", help="Version of NAME-candidates (default: the newest).")
    ] = None,
    approve: Annotated[
        bool, typer.Option("--approve", help="Ask in the Prefect UI, and promote when somebody there says so.")
    ] = False,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Make a registered prediction the champion, if its weights are whole and its stored gate results say so.

    Nothing is scored and nothing is forced; every attempt is a run in MLflow.
    Example: relex promote qwen 3
    """
    import psutil

    from deploy.local import stack
    from flows.promote.promotion import promote as move

    by = psutil.Process().username()
    if approve:
        running = stack.running(home)
        os.environ.update(stack.environment(running))
        from flows.promote.flow import ask

        asked = ask(running, name, version, by=by)
        if as_json:
            _print_json(asdict(asked))
        else:
            out.print(asked.sentence, markup=False, highlight=False, soft_wrap=True)
        return
    _show_promotion(
        move(name, version, tracking_uri=stack.tracking_uri(home), by=by, downloads=home / "models"), as_json=as_json
    )


@app.command()
def rollback(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model.")],
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Give the place of champion back to the one before, if its weights are whole.

    Example: relex rollback qwen
    """
    import psutil

    from deploy.local import stack
    from flows.promote.promotion import rollback as move

    by = psutil.Process().username()
    _show_promotion(
        move(name, tracking_uri=stack.tracking_uri(home), by=by, downloads=home / "models"), as_json=as_json
    )


def _show_promotion(done: "Promotion", *, as_json: bool) -> None:
    if as_json:
        _print_json(done.to_json())
        return
    for line in filter(None, (done.sentence, done.entry.url)):
        out.print(line, markup=False, highlight=False, soft_wrap=True)


@app.command()
def serve(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the registered model, and of what is served.")],
    options: Annotated[list[str] | None, typer.Argument(metavar="-- OPTION", help="Options for the engine.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="COMMAND",
            help="Command with {model}, {host}, {port} and {name} (default: vllm if installed, or transformers serve).",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; nobody is asked for a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any.")] = 8000,
    poll_seconds: Annotated[float, typer.Option(min=0.1, help="How often to look whether the champion changed.")] = 10,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Serve the champion over HTTP, its files verified, and change to the next one without a failed request.

    In the foreground, until interrupted.
    Example: relex serve qwen -- --max-model-len 8192 --gpu-memory-utilization 0.45
    """
    from deploy.local import stack
    from deploy.serving.service import News, Service
    from deploy.serving.service import serve as run_service

    def tell(news: News) -> None:
        if as_json:
            typer.echo(json.dumps(asdict(news)))
        else:
            out.print(news.text, markup=False, highlight=False, soft_wrap=True)

    place = home.expanduser().resolve()
    service = Service(name, place, engine, tuple(options or ()), host=host, port=port, poll_seconds=poll_seconds)
    run_service(service, tracking_uri=lambda: stack.tracking_uri(place), tell=tell)


@app.command()
def demo(
    directory: Annotated[Path, typer.Option("--out", help="Where the demo lives.")] = Path("relex-demo"),
    seed: Annotated[int, typer.Option(help="Seed of the demo's training run.")] = 0,
    home: Home = HOME,
    as_json: Json = False,
) -> None:
    """Run the whole thing on a real, tiny RLVR run: train, watch, predict, score, decide, register.

    Example: relex demo
    """
    from flows.demo.run import run_demo, show

    done = run_demo(directory, seed=seed, home=home, err=err)
    if as_json:
        _print_json(asdict(done))
    else:
        show(out, done)


def _cache(given: Path | None) -> Path:
    import platformdirs

    return given if given is not None else platformdirs.user_cache_path("relex")


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=1, default=str))


def main() -> None:
    """Run the command line; a refusal is one line on stderr and exit status 1."""
    try:
        app(prog_name="relex")
    except (RelexError, EvaluationError, DeployError, FlowError) as error:
        err.print(
            f"relex: {type(error).__name__}: {' '.join(str(error).split())}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(1)
    except OSError as error:
        # A full disk or a directory without permission: what is half written has no name yet.
        err.print(f"relex: {type(error).__name__}: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("relex: interrupted; what is finished is kept", soft_wrap=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
