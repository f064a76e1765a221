"""Figures a person would look at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure


@dataclass(frozen=True)
class Point:
    """Accuracy and its standard error at one training step; `label` names the method, `chosen` the registered one."""

    step: int
    accuracy: float
    standard_error: float
    label: str = ""
    chosen: bool = False


def accuracy_by_step(
    path: Path,
    *,
    title: str,
    benchmark: str,
    window: tuple[int, int],
    real: Sequence[Point],
    predicted: Sequence[Point],
    later: Sequence[Point] = (),
) -> None:
    """Draw real accuracy against training step, the observed window shaded, and the predicted models at their targets.

    `real` is the base and what was observed, `later` what the run really reached afterwards; bars are one standard
    error. Writes a PNG.
    """
    figure = Figure(figsize=(8.0, 4.5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(window[0], window[1], color="0.92", label=f"observed: steps {window[0]} to {window[1]}")
    ordered = sorted([*real, *later], key=lambda point: point.step)
    axes.errorbar(
        [point.step for point in ordered],
        [point.accuracy for point in ordered],
        [point.standard_error for point in ordered],
        color="black",
        linewidth=1.2,
        capsize=2,
        marker="o",
        markersize=4,
        label="real run",
        zorder=4,
    )
    labels = list(dict.fromkeys(point.label for point in predicted))
    for number, label in enumerate(labels):
        points = sorted((point for point in predicted if point.label == label), key=lambda point: point.step)
        axes.errorbar(
            [point.step for point in points],
            [point.accuracy for point in points],
            [point.standard_error for point in points],
            color=f"C{number}",
            linestyle="--",
            linewidth=1.0,
            capsize=2,
            marker="s",
            markersize=9,
            markerfacecolor="white",
            label=f"predicted: {label}",
        )
    for point in predicted:
        if point.chosen:
            axes.plot(
                point.step,
                point.accuracy,
                marker="*",
                markersize=18,
                color="gold",
                markeredgecolor="black",
                linestyle="none",
                label=f"registered: step {point.step}",
                zorder=3,
            )
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0.0, 1.02)
    axes.set_xlim(left=-0.02 * max(point.step for point in (*ordered, *predicted)))
    axes.set_title(f"{title}\n{benchmark}", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    figure.savefig(path, metadata={"Software": None})
