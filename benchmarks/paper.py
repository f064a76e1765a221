"""The paper's three published models (arXiv 2605.21468) made again, from the Hub to the six benchmarks.

For each run: the window is read from the Hub, the last observed checkpoint and RELEX's prediction are written, the base
is fetched, and the three are scored on MATH and on the five other benchmarks of the paper. Every stage is kept in
--out, batch by batch where models answer: the same call goes on after a kill, and does nothing again.

    python -m benchmarks.paper --out paper --device cuda:0,cuda:1 --backend vllm

writes paper.json and paper.md to --out, the latter with the published figures beside. Needs the Hub, disk for three
models a run, and a GPU; --limit 16 is a rehearsal.
"""

import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path

from rich.console import Console

from evaluation.answers.harness import evaluate
from evaluation.benchmarks.fetch import fetch
from evaluation.child import kept_children
from evaluation.files import write_file
from flows.console import Bars, markdown_table
from relex.extrapolation import extrapolate_run
from relex.files.block_cache import BlockCache
from relex.output.download import local_model
from relex.output.manifest import FILE_NAME
from relex.predictors import parse_method

MATH = "math"
# The paper averages over these.
OTHERS = ("aime_2025", "aime_2026", "hmmt_feb_2025", "amc_2023", "olympiadbench")
MEMORY = 4 << 30


@dataclass(frozen=True)
class Figures:
    """What the paper reports of one model, in %: MATH, and the average of the other five; None: not reported."""

    math: float | None = None
    others: float | None = None


@dataclass(frozen=True)
class Published:
    """One run: where it lies, its window and target on the axis of saved steps, and the paper's figures.

    `label` is the step that the released prediction is named after (see docs/methods.md).
    """

    name: str
    base: str
    window: int
    label: int
    target: int
    figures: dict[str, Figures]

    @property
    def run(self) -> str:
        return f"hf://relex-rlvr/RLVR-{self.name}"


BASE, OBSERVED, REAL, RELEX = "base", "last observed", "real run, step 500", "RELEX"
RUNS = (
    Published(
        "Qwen2.5-Math-1.5B", "hf://Qwen/Qwen2.5-Math-1.5B", 75, 500, 1000,
        {BASE: Figures(48.2), REAL: Figures(71.5, 28.4), RELEX: Figures(71.6, 30.0)},
    ),
    Published(
        "Qwen3-4B-Base", "hf://Qwen/Qwen3-4B-Base", 75, 500, 500,
        {BASE: Figures(64.0), REAL: Figures(85.5, 42.3), RELEX: Figures(85.6, 43.0)},
    ),
    Published(
        "Qwen3-8B-Base", "hf://Qwen/Qwen3-8B-Base", 100, 750, 750,
        {BASE: Figures(73.9), REAL: Figures(88.5, 47.1), RELEX: Figures(87.4, 46.2)},
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Scoring:
    """How models are asked, as `relex evaluate` takes it."""

    device: str
    backend: str
    batch_size: int | None
    limit: int | None


def predicted(run: Published, method: str, step: int, root: Path, bars: Bars, *, disk: int) -> Path:
    """Return the model that `method` makes of the window at `step`, with the base's tokenizer, written unless there."""
    out = root / method
    model = out / f"step-{step}"
    if not (model / FILE_NAME).is_file():
        with BlockCache(root, size=disk) as blocks:
            extrapolate_run(
                run.run,
                run.base,
                targets=[step],
                out=out,
                window=run.window,
                method=parse_method(method),
                memory=MEMORY,
                threads=os.cpu_count() or 1,
                # To hold is to stay at the last observed step.
                inside="allow" if method == "hold" else "refuse",
                grams=root / "grams",
                staging=root / "staging",
                blocks=blocks,
                command=sys.argv,
                tell=lambda what, done, total: bars(f"{run.name} {what}", done, total),
            )
    return model


def fetched(base: str, directory: Path) -> Path:
    """Return the copy of the base in `directory`, fetched unless it is there; one that is under way is hidden."""
    return next(directory.glob("[!.]*"), None) or local_model(base, directory)


def score(model: Path, root: Path, scoring: Scoring, bars: Bars) -> dict[str, tuple[float, float]]:
    """Return accuracy and its standard error on each benchmark, in 0..1."""
    evaluated = evaluate(
        model,
        (MATH, *OTHERS),
        cache=root / "evaluations",
        device=scoring.device,
        backend=scoring.backend,
        batch_size=scoring.batch_size,
        limit=scoring.limit,
        on_progress=lambda step: bars(f"{model.name} {step.benchmark}", step.done, step.total, step.pace),
    )
    return {each.report.benchmark: (each.report.accuracy, each.report.standard_error) for each in evaluated}


def reproduce(run: Published, root: Path, scoring: Scoring, *, disk: int) -> dict[str, dict[str, tuple[float, float]]]:
    """Return the scores of the base, the last observed checkpoint and the prediction of one run, by model."""
    with Bars(Console(stderr=True)) as bars:
        models = {
            BASE: fetched(run.base, root / "base"),
            OBSERVED: predicted(run, "hold", run.window, root, bars, disk=disk),
            RELEX: predicted(run, "relex", run.target, root, bars, disk=disk),
        }
        return {name: score(model, root, scoring, bars) for name, model in models.items()}


def table(run: Published, scores: dict[str, dict[str, tuple[float, float]]]) -> list[str]:
    """Return the Markdown of one run: what was measured, in % with its standard error, and what is published."""
    rows = []
    for name in (BASE, OBSERVED, REAL, RELEX):
        measured = scores.get(name, {})
        cells = [f"{100 * measured[each][0]:.1f} ± {100 * measured[each][1]:.1f}" if measured else ""
                 for each in (MATH, *OTHERS)]  # fmt: skip
        mean = f"{100 * fsum(measured[each][0] for each in OTHERS) / len(OTHERS):.1f}" if measured else ""
        figures = run.figures.get(name, Figures())
        known = ["" if value is None else f"{value:.1f}" for value in (figures.math, figures.others)]
        rows.append([name if name != RELEX else f"{RELEX} @{run.label}", *cells, mean, *known])
    headings = ["model", MATH, *OTHERS, "mean of the five", "MATH, published", "mean of the five, published"]
    title = f"## {run.name}: window {run.window}, target step {run.target}, released as @{run.label}"
    return [title, "", *markdown_table(headings, rows), ""]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for all that is kept, and for the table")
    parser.add_argument("--run", nargs="+", choices=[run.name for run in RUNS], default=[run.name for run in RUNS])
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, or several workers: cuda:0,cuda:1")
    parser.add_argument("--backend", default="hf", help="hf or vllm, as relex evaluate takes it")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--limit", type=int, help="the first problems of each benchmark only")
    parser.add_argument("--disk", type=int, default=8, help="GiB for what is read from the Hub, until it has been read")
    given = parser.parse_args(arguments)
    scoring = Scoring(given.device, given.backend, given.batch_size, given.limit)
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    for benchmark in (MATH, *OTHERS):
        fetch(benchmark)
    asked = "all problems" if given.limit is None else f"the first {given.limit} problems of each"
    lines = [
        "# The published models, made again", "",
        f"Accuracy in %, {asked}. Published: arXiv 2605.21468, blank where no figure is known here.", "",
    ]  # fmt: skip
    written = {}
    with kept_children():
        for run in (run for run in RUNS if run.name in given.run):
            written[run.name] = reproduce(run, out / run.name, scoring, disk=given.disk << 30)
            lines += table(run, written[run.name])
            # After each run, for what comes next may take a day.
            write_file(out / "paper.json", json.dumps({"limit": given.limit, "accuracy": written}, indent=1) + "\n")
            write_file(out / "paper.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
