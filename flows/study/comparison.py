"""What a comparison of methods shows: every model with its accuracy, its distance and its cost, and the page of it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from flows.console import markdown_table
from relex import plots
from relex.distance import Distance

Role = Literal["base", "observed", "real", "predicted", "logits", "reconstructed"]

_MEANINGS = """\
Differences are paired, from the last observed checkpoint, with their 95 % interval. Against the real checkpoint of the
step: error is the norm of what is wrong over the norm of the real delta; cosine and norm are of the predicted delta and
the real one; skill is 1 − error² over that of holding the last observed checkpoint, above 0 is nearer than that.
Σ|c| says how much the noise of the checkpoints is amplified, fit is seconds to the prediction as numbers."""


@dataclass(frozen=True)
class Accuracy:
    """One model on one benchmark, in 0..1, and its paired difference from the last observed checkpoint.

    The difference and the ends of its 95 % interval are None for the last observed checkpoint itself.
    """

    benchmark: str
    n: int
    accuracy: float
    standard_error: float
    difference: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Row:
    """One model: by which method, standing for which step, how near to the real one, at what cost.

    `distance` is None where the run has no such step. `amplification` is the largest Σ|c| of a tensor, None for what is
    no combination of checkpoints; `fit_seconds` is the time until what is predicted is known.
    """

    role: Role
    name: str
    step: int
    model: str
    accuracies: tuple[Accuracy, ...] = ()
    distance: Distance | None = None
    amplification: float | None = None
    fit_seconds: float | None = None


@dataclass(frozen=True)
class Comparison:
    """All models from one observed budget, by step.

    `write_seconds` is what the one pass took that wrote all predicted models not there yet; None when all were.
    """

    run: str
    base: str
    steps: tuple[int, ...]
    rows: tuple[Row, ...]
    write_seconds: float | None
    warnings: tuple[str, ...]

    @property
    def scored(self) -> tuple[Accuracy, ...]:
        """The first model's accuracies: one for each benchmark."""
        return self.rows[0].accuracies

    @property
    def summary(self) -> str:
        """One line: from what, and what it cost to write."""
        written = sum(row.role in ("predicted", "reconstructed") for row in self.rows)
        seconds = self.write_seconds
        cost = "were there" if seconds is None else f"(those not there yet written in one pass of {seconds:.1f} s)"
        first, last = self.steps[0], self.steps[-1]
        return f"{len(self.steps)} checkpoints observed, steps {first} to {last}; {written} models {cost}."

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)


def headings(comparison: Comparison) -> list[str]:
    """Return the headings of the table; two for each benchmark."""
    several = len(comparison.scored) > 1
    scores = [
        f"{what}{f' {score.benchmark}' if several else ''}"
        for score in comparison.scored
        for what in ("accuracy", "vs last observed")
    ]
    return ["model", "step", *scores, "error", "cosine", "norm", "skill", "Σ|c|", "fit s"]


def cells(row: Row) -> list[str]:
    """Return what the table shows of one model."""
    scores = [
        text
        for score in row.accuracies
        for text in (
            f"{score.accuracy:.3f}",
            "" if score.difference is None else f"{score.difference:+.3f} [{score.low:+.3f}, {score.high:+.3f}]",
        )
    ]
    near = row.distance
    numbers = (
        _number(near.error if near else None, ".2f"),
        _number(near.cosine if near else None, ".3f"),
        _number(near.norm_ratio if near else None, ".2f"),
        _number(near.skill if near else None, "+.2f"),
        _number(row.amplification, ".1f"),
        _number(row.fit_seconds, ".2f"),
    )
    return [row.name, str(row.step), *scores, *numbers]


def page(comparison: Comparison, figures: Sequence[str]) -> str:
    """Return the comparison as Markdown."""
    lines = [f"# {comparison.run}", "", comparison.summary, "", *(f"- Warning: {text}" for text in comparison.warnings)]
    lines += [f"- {score.benchmark}: {score.n} problems" for score in comparison.scored]
    lines += ["", *markdown_table(headings(comparison), map(cells, comparison.rows)), "", _MEANINGS, ""]
    lines += [f"![accuracy by training step]({name})\n" for name in figures]
    return "\n".join(lines)


def draw(comparison: Comparison, out: Path) -> list[str]:
    """Draw accuracy by step, a figure each benchmark, into `out`; return their names, compare.png first."""
    figures = []
    for number, scored in enumerate(comparison.scored):
        points = {
            row: plots.Point(row.step, row.accuracies[number].accuracy, row.accuracies[number].standard_error, row.name)
            for row in comparison.rows
        }
        figures.append("compare.png" if number == 0 else f"compare-{scored.benchmark}.png")
        plots.accuracy_by_step(
            out / figures[-1],
            title=comparison.run,
            benchmark=f"{scored.benchmark}, {scored.n} problems",
            window=(comparison.steps[0], comparison.steps[-1]),
            real=[point for row, point in points.items() if row.role in ("base", "observed")],
            predicted=[point for row, point in points.items() if row.role in ("predicted", "logits", "reconstructed")],
            later=[point for row, point in points.items() if row.role == "real"],
        )
    return figures


def _number(value: float | None, form: str) -> str:
    return "—" if value is None else format(value, form)
