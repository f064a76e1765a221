"""The demo: a real RLVR run trains while relex watches it, predicts, scores, decides and registers, as for a user.

Everything the demo makes lies in one directory; a second call takes up what is there.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from deploy.local import stack
from evaluation.benchmarks.benchmark import write_benchmark
from evaluation.child import kept_children
from flows.console import plain_table
from flows.decide.page import draw, rungs
from flows.decide.record import OBSERVED
from flows.decide.score import reports
from flows.demo.errors import DemoRunError
from flows.demo.task import DIGITS, problems
from flows.processes import spawn_promoter, spawn_watcher
from flows.search.ladder import score
from flows.settings import Settings, load_settings
from flows.state.decision import Decision, Model, Score
from flows.state.events import WINDOW_READY
from flows.state.ledger import read_ledger
from flows.state.windows import read_decisions
from relex.files.location import open_directory
from relex.layouts.steps import step_directories

STEPS = 360
WINDOW = 48
# Where the real run is scored afterwards, to be compared with.
LATER = (72, 120, 240, 360)
SAVE_STEPS = 2
# At 4e-6 this run goes on so straight that plain RELEX to its end is right, which hides that a line overshoots. At this
# rate the weights bend, RELEX to the end unlearns what was learnt, and the ladder finds where to stop.
LEARNING_RATE = 1e-5
BASELINE = (
    f"The learning rate, {LEARNING_RATE:g}, is chosen to show that a line overshoots, and no saving is claimed at it:"
    " at 1e-4 plain RL is at .95 after 12 steps (docs/evidence.md)."
)
# More than the default of 2, which a winner of .97 shown on 1,000 problems does not come under.
STOP_PRICE = 5
PROBLEMS = {"selection": 500, "gate": 1000, "report": 1000}
NAME = "sort-digits"
# Long after everything else has ended: the flow that decides has failed, and its page says why.
_DECISION_SECONDS = 1800.0


@dataclass(frozen=True)
class Demonstration:
    """What the demo ended in: the decision, what the real run reached later, and where to look."""

    decision: Decision
    later: tuple[Score, ...]
    figure: Path
    prefect_url: str
    mlflow_url: str
    seconds: float


def run_demo(directory: Path, *, seed: int, home: Path, err: Console) -> Demonstration:
    """Run the demo in `directory`; raises DemoRunError with the log to read when a process of it fails."""
    began = time.monotonic()
    # Trainer and evaluation share few cores, and the threads of a tiny model only fight each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    directory = directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    config = prepare(directory)
    settings = load_settings(config)
    columns = (TextColumn("{task.description:>34}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err) as progress, ThreadPoolExecutor(2) as pool:
        starting = pool.submit(stack.up, home)
        servers = progress.add_task("starting Prefect and MLflow", total=None)
        pretrain(Path(settings.base), directory, seed, progress)
        started = starting.result()
        progress.update(servers, total=1, completed=1)
        spawn_watcher(started, settings.training_run, config)
        with training(settings, directory, seed) as trainer:
            decision = follow(settings, trainer, directory, progress)
        later = score_later(settings, pool, progress)
    figure = directory / "accuracy.png"
    draw(decision, figure, later=later)
    log_curve(started.mlflow_url, settings, later)
    # Who looks at the pages now may promote on them.
    spawn_promoter(started)
    seconds = time.monotonic() - began
    return Demonstration(decision, tuple(later), figure, started.prefect_url, started.mlflow_url, seconds)


def prepare(directory: Path) -> Path:
    """Write the benchmarks and relex.yaml as a user would; return the path of the latter."""
    for split, count in PROBLEMS.items():
        if split in ("selection", "gate", "report"):
            write_benchmark(
                directory / "benchmarks",
                f"{NAME}-{split}",
                problems(split, count),  # type: ignore[arg-type]
                max_new_tokens=DIGITS + 1,
                # Drawn at random: the first n are a sample as they are.
                order="given",
            )
    content = {
        "training_run": NAME,
        "checkpoints": "run",
        "base": "base",
        "window": WINDOW,
        "targets": "auto",
        "total_steps": STEPS,
        "methods": "auto",
        "selection": f"benchmarks/{NAME}-selection.yaml",
        "gate": f"benchmarks/{NAME}-gate.yaml",
        "report": [f"benchmarks/{NAME}-report.yaml"],
        "registered_model": NAME,
        "stop_file": "STOP",
        "stop_price": STOP_PRICE,
        "batch_size": 250,
        "memory": "256MiB",
    }
    config = directory / "relex.yaml"
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config


def pretrain(base: Path, directory: Path, seed: int, progress: Progress) -> None:
    """Supervise the base model, unless it is there."""
    bar = progress.add_task("supervising the base model", total=100)
    if not base.exists():
        log = directory / "pretrain.log"
        process = start("flows.demo.pretrain", ["--out", str(base), "--seed", str(seed)], log)
        try:
            while process.poll() is None:
                progress.update(bar, completed=percent(log))
                time.sleep(0.3)
        finally:
            stop(process)
        check(process, log)
    progress.update(bar, completed=100)


@contextmanager
def training(settings: Settings, directory: Path, seed: int) -> Iterator[subprocess.Popen[bytes] | None]:
    """Run the RLVR training as a process of its own while the block runs; None when it has been run before."""
    run = Path(settings.checkpoints)
    if (run / f"checkpoint-{STEPS}" / "trainer_state.json").is_file():
        yield None
        return
    # An unfinished run cannot be taken up: the trainer keeps weights only, as most RLVR runs do for every step.
    shutil.rmtree(run, ignore_errors=True)
    arguments = ["--base", settings.base, "--out", str(run), "--steps", str(STEPS)]
    arguments += ["--save-steps", str(SAVE_STEPS), "--seed", str(seed), "--learning-rate", str(LEARNING_RATE)]
    process = start("flows.demo.trainer", arguments, directory / "trainer.log")
    try:
        yield process
    finally:
        stop(process)


def follow(
    settings: Settings, trainer: subprocess.Popen[bytes] | None, directory: Path, progress: Progress
) -> Decision:
    """Show training and pipeline until both are done; return the decision."""
    steps = progress.add_task(f"GRPO, {STEPS} steps", total=STEPS)
    window = progress.add_task(f"window of {WINDOW} steps", total=WINDOW)
    pipeline = progress.add_task("waiting for the window", total=None)
    since = time.monotonic()
    while True:
        run = open_directory(settings.checkpoints)
        latest = max(step_directories(run), default=0) if run.exists() else 0
        progress.update(steps, completed=latest)
        progress.update(window, completed=min(latest, WINDOW))
        if trainer is not None and trainer.poll() is not None:
            check(trainer, directory / "trainer.log")
        training_on = trainer is not None and trainer.poll() is None
        decisions = read_decisions(settings)
        progress.update(pipeline, description=stage(settings, decided=bool(decisions)))
        if decisions and not training_on:
            progress.update(pipeline, total=1, completed=1)
            return decisions[-1]
        if training_on:
            since = time.monotonic()
        elif time.monotonic() - since > _DECISION_SECONDS:
            raise DemoRunError(
                f"no decision {_DECISION_SECONDS:.0f} s after the training ended: the failed flow run is on the Prefect"
                f" page, its log is named by relex status. {WINDOW_READY} is sent again until it is decided."
            )
        time.sleep(0.5)


def stage(settings: Settings, *, decided: bool) -> str:
    """Say in a few words where the pipeline is, from what lies on disk."""
    if decided:
        return "decided"
    if not read_ledger(settings).windows:
        return "waiting for the window"
    models = len(list(settings.home.glob("windows/*/models/*/step-*")))
    reports = len(list(settings.home.glob("evaluations/**/report.json")))
    if not models:
        return "predicting"
    return f"scoring {models} models, {reports} reports"


def score_later(settings: Settings, pool: ThreadPoolExecutor, progress: Progress) -> list[Score]:
    """Score what the run really reached later, on the report benchmark; it decides nothing."""
    bar = progress.add_task("scoring the real later steps", total=len(LATER))

    def score_step(step: int) -> Score:
        model = Model("observed", step, str(step_directories(open_directory(settings.checkpoints))[step]))
        measured = score(model, reports(settings, model, settings.report)[0])
        progress.advance(bar)
        return measured

    with kept_children():
        # Each thread is part of the block.
        scoring = [pool.submit(copy_context().run, score_step, step) for step in LATER]
        return [each.result() for each in scoring]


def log_curve(tracking_uri: str, settings: Settings, later: list[Score]) -> None:
    """Extend the real run's curve in MLflow by what came after the decision."""
    from deploy import runs

    runs.log_series(
        settings.registered_model,
        {score.model.step: score.accuracy for score in later},
        tracking_uri=tracking_uri,
        series=f"{settings.training_run} {OBSERVED}",
        metric="report_accuracy",
    )


def show(out: Console, done: Demonstration) -> None:
    """Print the table, the decision and where to look."""
    decision, later = done.decision, done.later
    if decision.ladder:
        headings, climbed = rungs(decision.ladder)
        answers, seconds = decision.cost
        title = f"the ladder, on the first {decision.ladder[0].n} selection problems; ↓ is worse than the best below it"
        out.print(plain_table(*headings, rows=climbed, title=title))
        out.print(f"Choosing cost {answers:,} answers, {seconds:.0f} s in the models.", highlight=False)
    title = f"{later[0].benchmark}: {later[0].n} problems"
    table = plain_table("model", "step", "accuracy", "± s.e.", "", title=title)
    rows = [*decision.report, *later]
    for scored in sorted(rows, key=lambda row: (row.model.step, row.model.role == "candidate")):
        real = scored.model.role != "candidate"
        name = "base" if scored.model.role == "base" else "real run" if real else f"predicted: {scored.model.method}"
        mark = "last observed" if real and scored.model.step == decision.steps[-1] else ""
        if decision.registered and scored.model == decision.winner:
            mark = "registered"
        table.add_row(name, str(scored.model.step), f"{scored.accuracy:.3f}", f"{scored.standard_error:.3f}", mark)
    out.print(table)
    registered = f" as {decision.registered}" if decision.registered else ""
    out.print(Text.assemble((decision.verdict, "bold"), f"{registered}. {decision.reason}"), highlight=False)
    if decision.stop:
        out.print(f"{decision.stop} {what_stopping_costs(done)}", soft_wrap=True, highlight=False)
    out.print(BASELINE, soft_wrap=True, highlight=False)
    out.print(f"figure: {done.figure}", soft_wrap=True, highlight=False)
    out.print(f"Prefect: {done.prefect_url}  MLflow: {done.mlflow_url}  (left running; `relex down` stops them)")
    out.print(f"{done.seconds:.0f} s")


def what_stopping_costs(done: Demonstration) -> str:
    """Say what a stop at the window would have cost: the demo trains on to see."""
    winner = next((score for score in done.decision.report if score.model == done.decision.winner), None)
    if winner is None:
        return ""
    end = max(done.later, key=lambda score: score.model.step)
    points = 100 * (end.accuracy - winner.accuracy)
    return (
        f"This run went on, to see: a stop would have saved {end.model.step - done.decision.window} of"
        f" {end.model.step} steps and cost {points:.1f} points."
    )


def start(module: str, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a module of the demo with its output in `log`."""
    with log.open("wb") as file:
        return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], stdout=file, stderr=file)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that is still there."""
    if process.poll() is None:
        process.terminate()
        process.wait(30)


def check(process: subprocess.Popen[bytes], log: Path) -> None:
    """Raise DemoRunError with the last line of the log when the process failed."""
    if process.returncode != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["nothing"]
        raise DemoRunError(
            f"{process.args!r} ended with status {process.returncode}: {lines[-1]} (all of it in {log})."
        )


def percent(log: Path) -> int:
    """Return how far the last `done/total` written to `log` is."""
    written = re.findall(rb"(\d+)/(\d+)", log.read_bytes()[-2000:])
    return 100 * int(written[-1][0]) // int(written[-1][1]) if written else 0
