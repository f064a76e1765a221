"""`relex analyze`: how a training run moves, as numbers, a page and figures."""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evaluation.answers.logprobs import Response, read_responses, token_logprobs
from flows.console import markdown_table
from relex import plots
from relex.analysis import Analysis, Moments, Part, analyze_run, series_moments
from relex.extrapolation import Request, Tell, extrapolate
from relex.files.block_cache import BlockCache
from relex.predictors import parse_method
from relex.trajectory import Trajectory, open_run, open_trajectory

HEADINGS = ("module", "tensors", "share of ‖Δ‖²", "rank-1 energy", "R² of its coordinate", "median weight R²")


@dataclass(frozen=True)
class Analyzed:
    """What was found. `tokens` is R² of the log-probability of each token of fixed responses, if there are any."""

    analysis: Analysis
    tokens: Moments | None
    figures: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def analyze(
    run: str,
    base: str,
    *,
    out: Path,
    window: int | None = None,
    seed: int = 0,
    responses: Path | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    memory: int,
    threads: int,
    cache: Path,
    blocks: BlockCache | None = None,
    tell: Tell | None = None,
) -> Analyzed:
    """Analyze the checkpoints up to `window` (None: all) and write analysis.json, analysis.md and figures to `out`.

    Raises RelexError, and EvaluationError for the responses.
    """
    fixed = read_responses(responses) if responses is not None else []
    found = analyze_run(
        run,
        base,
        grams=cache / "grams",
        memory=memory,
        threads=threads,
        window=window,
        seed=seed,
        blocks=blocks,
        tell=tell,
    )
    tokens = None
    if fixed:
        trajectory = open_run(run, base, window=window, blocks=blocks)
        tokens = _tokens(
            trajectory, fixed, device=device, dtype=dtype, memory=memory, threads=threads, cache=cache, tell=tell
        )
    out.mkdir(parents=True, exist_ok=True)
    plots.layer_heatmaps(out / "layers.png", found)
    plots.coordinate_curves(out / "coordinates.png", found)
    both = {"weights": found.whole.weights} | ({"token log-probabilities": tokens} if tokens is not None else {})
    plots.r_squared_histograms(out / "r-squared.png", both)
    done = Analyzed(found, tokens, ("layers.png", "coordinates.png", "r-squared.png"))
    out.joinpath("analysis.json").write_text(json.dumps(done.to_json(), indent=1) + "\n", encoding="utf-8")
    out.joinpath("analysis.md").write_text(page(done), encoding="utf-8")
    return done


def page(done: Analyzed) -> str:
    """Return the analysis as Markdown."""
    found = done.analysis
    lines = [
        f"# {found.run}",
        "",
        f"{len(found.steps)} checkpoints, steps {found.steps[0]} to {found.steps[-1]}, against {found.base}.",
        "",
        *(f"- Warning: {text}" for text in found.warnings),
        f"- Energy of the leading {len(found.energies)} directions:"
        f" {', '.join(f'{share:.4f}' for share in found.energies)} of the whole model.",
        f"- {described('weights', found.whole.weights)}",
    ]
    if done.tokens is not None:
        lines.append(f"- {described('token log-probabilities', done.tokens)}")
    lines += [
        "",
        *markdown_table(HEADINGS, map(cells, (*found.modules, found.whole))),
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


def described(what: str, item: Moments) -> str:
    """Return R² of many values on the step in a sentence."""
    kept = f"{item.kept} of {item.drawn} {what} change enough to tell"
    if item.quartiles is None:
        return f"{kept}."
    low, median, high = item.quartiles
    return f"{kept}: R² on the step has median {median:.3f}, quartiles {low:.3f} and {high:.3f}."


def _tokens(
    trajectory: Trajectory,
    responses: Sequence[Response],
    *,
    device: str,
    dtype: str,
    memory: int,
    threads: int,
    cache: Path,
    tell: Tell | None,
) -> Moments:
    """Score the responses with every checkpoint, copied one at a time: as a model directory, whatever its layout."""
    by_step: list[list[float]] = []
    cache.mkdir(parents=True, exist_ok=True)
    for number, checkpoint in enumerate(trajectory.checkpoints):
        if tell is not None:
            tell("log-probabilities", number, len(trajectory.checkpoints))
        # A trajectory has two checkpoints at least: the first is its first update, the others are the latest of theirs.
        part = open_trajectory(trajectory.base, trajectory.checkpoints[: max(2, number + 1)])
        method = parse_method("hold" if number > 0 else "first-update:alpha=1")
        with tempfile.TemporaryDirectory(dir=cache, prefix="checkpoint-") as scratch:
            request = Request(method, checkpoint.step, Path(scratch) / f"step-{checkpoint.step}")
            extrapolate(part, [request], grams=cache / "grams", memory=memory, threads=threads)
            scored = token_logprobs(request.directory, responses, device=device, dtype=dtype)
        by_step.append([value for row in scored for value in row])
    return series_moments(list(zip(*by_step, strict=True)), trajectory.steps)
