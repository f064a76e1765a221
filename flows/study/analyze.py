"""`relex analyze`: how a training run moves, as numbers, a page and figures."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.answers.logprobs import Response, read_responses, token_logprobs
from flows.console import markdown_table
from flows.study.resources import Resources
from relex import plots
from relex.analysis import Analysis, Moments, Part, analyze_run, series_moments
from relex.extrapolation import Request, extrapolate
from relex.predictors import parse_method
from relex.trajectory import Trajectory, open_run, open_trajectory

HEADINGS = ("module", "tensors", "share of ‖Δ‖²", "rank-1 energy", "R² of its coordinate", "median weight R²")


@dataclass(frozen=True)
class Analyzed:
    """What an analysis shows; `tokens` is R² of the log-probability of each token of fixed responses, if any."""

    analysis: Analysis
    tokens: Moments | None
    figures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def analyze(
    run: str,
    base: str,
    resources: Resources,
    *,
    out: Path,
    window: int | None = None,
    seed: int = 0,
    responses: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
) -> Analyzed:
    """Analyze the checkpoints up to `window` (None: all) and write analysis.json, analysis.md and figures to `out`.

    Raises RelexError, and EvaluationError for the responses.
    """
    fixed = read_responses(responses) if responses is not None else []
    analysis = analyze_run(
        run,
        base,
        grams=resources.grams,
        memory=resources.memory,
        threads=resources.threads,
        window=window,
        seed=seed,
        blocks=resources.blocks,
        tell=resources.tell,
    )
    tokens = None
    if fixed:
        trajectory = open_run(run, base, window=window, blocks=resources.blocks)
        tokens = _tokens(trajectory, fixed, resources, device=device, dtype=dtype)
    out.mkdir(parents=True, exist_ok=True)
    plots.layer_heatmaps(out / "layers.png", analysis)
    plots.coordinate_curves(out / "coordinates.png", analysis)
    both = {"weights": analysis.whole.weights} | ({"token log-probabilities": tokens} if tokens is not None else {})
    plots.r_squared_histograms(out / "r-squared.png", both)
    done = Analyzed(analysis, tokens, ("layers.png", "coordinates.png", "r-squared.png"))
    out.joinpath("analysis.json").write_text(json.dumps(done.to_json(), indent=1) + "\n", encoding="utf-8")
    out.joinpath("analysis.md").write_text(page(done), encoding="utf-8")
    return done


def page(done: Analyzed) -> str:
    """Return the analysis as Markdown."""
    analysis = done.analysis
    lines = [
        f"# {analysis.run}",
        "",
        f"{len(analysis.steps)} checkpoints, steps {analysis.steps[0]} to {analysis.steps[-1]},"
        f" against {analysis.base}.",
        "",
        *(f"- Warning: {text}" for text in analysis.warnings),
        f"- Energy of the leading {len(analysis.energies)} directions:"
        f" {', '.join(f'{share:.4f}' for share in analysis.energies)} of the whole model.",
        f"- {described('weights', analysis.whole.weights)}",
    ]
    if done.tokens is not None:
        lines.append(f"- {described('token log-probabilities', done.tokens)}")
    lines += [
        "",
        *markdown_table(HEADINGS, map(cells, (*analysis.modules, analysis.whole))),
        "",
        *(line for name in done.figures for line in (f"![{name}]({name})", "")),
    ]
    return "\n".join(lines)


def cells(part: Part) -> list[str]:
    """Return what a table shows of a module type, or of the whole."""
    median = part.weights.quartiles[1] if part.weights.quartiles is not None else None
    numbers = (part.energy, part.r_squared, median)
    return [
        part.module or "all",
        str(part.tensors),
        f"{part.share:.3f}",
        *("—" if number is None else f"{number:.4f}" for number in numbers),
    ]


def described(what: str, moments: Moments) -> str:
    """Return R² of many values on the step in a sentence."""
    kept = f"{moments.kept} of {moments.drawn} {what} change enough to tell"
    if moments.quartiles is None:
        return f"{kept}."
    low, median, high = moments.quartiles
    return f"{kept}: R² on the step has median {median:.3f}, quartiles {low:.3f} and {high:.3f}."


def _tokens(
    trajectory: Trajectory,
    responses: Sequence[Response],
    resources: Resources,
    *,
    device: str,
    dtype: str,
) -> Moments:
    """Score the responses with every checkpoint, copied one at a time: as a model directory, whatever its layout."""
    by_step: list[list[float]] = []
    resources.cache.mkdir(parents=True, exist_ok=True)
    for number, checkpoint in enumerate(trajectory.checkpoints):
        if resources.tell is not None:
            resources.tell("log-probabilities", number, len(trajectory.checkpoints))
        # A trajectory has two checkpoints at least: the first is its first update, the others are the latest of theirs.
        part = open_trajectory(trajectory.base, trajectory.checkpoints[: max(2, number + 1)])
        method = parse_method("hold" if number > 0 else "first-update:alpha=1")
        with tempfile.TemporaryDirectory(dir=resources.cache, prefix="checkpoint-") as scratch:
            request = Request(method, checkpoint.step, Path(scratch) / f"step-{checkpoint.step}")
            extrapolate(part, [request], grams=resources.grams, memory=resources.memory, threads=resources.threads)
            scored = token_logprobs(request.directory, responses, device=device, dtype=dtype)
        by_step.append([value for row in scored for value in row])
    return series_moments(list(zip(*by_step, strict=True)), trajectory.steps)
