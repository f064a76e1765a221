"""Figures a person would look at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from relex.analysis import BINS, Analysis, Moments

# From the first to the last method at one step, as a share of the axis.
_DODGE = 0.03
# Up to so many a legend finds room beside the curves.
_FEW_LABELS = 3
_MARKERS = "sDo^v<>ph"
# A cell of a heatmap carries its number up to so many rows: of more it cannot be read.
_ROWS_WITH_NUMBERS = 64
# Below this part of the colour scale black numbers cannot be read.
_MIDDLE = 0.6


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
    room: tuple[float, float] | None = None,
) -> None:
    """Draw real accuracy against training step, the observed window shaded, and the predicted models at their targets.

    `real` is the base and what was observed, `later` what the run really reached afterwards; bars are one standard
    error. `room` is from what the registered model has at least up to the ceiling. Writes a PNG.
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
    reach = max(point.step for point in (*ordered, *predicted))
    # Methods often agree: side by side they can all be seen.
    apart = _DODGE * reach / max(len(labels) - 1, _FEW_LABELS)
    shift = {label: apart * (number - (len(labels) - 1) / 2) for number, label in enumerate(labels)}
    for number, label in enumerate(labels):
        points = sorted((point for point in predicted if point.label == label), key=lambda point: point.step)
        axes.errorbar(
            [point.step + shift[label] for point in points],
            [point.accuracy for point in points],
            [point.standard_error for point in points],
            color=f"C{number}",
            linestyle="--",
            linewidth=1.0,
            capsize=2,
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=9 if len(labels) == 1 else 6,
            markerfacecolor="white",
            label=f"predicted: {label}",
        )
    for point in predicted:
        if point.chosen:
            axes.plot(
                point.step + shift[point.label],
                point.accuracy,
                marker="*",
                markersize=18,
                color="gold",
                markeredgecolor="black",
                linestyle="none",
                label=f"registered: step {point.step}",
                zorder=3,
            )
    if room is not None:
        most = 100 * (room[1] - room[0])
        axes.axhspan(*room, color="gold", alpha=0.25, label=f"training on may win at most {most:.1f} points")
    axes.set_xlabel("training step")
    axes.set_ylabel("accuracy")
    axes.set_ylim(0.0, 1.02)
    axes.set_xlim(left=-0.02 * reach)
    axes.set_title(f"{title}\n{benchmark}", fontsize=10)
    axes.grid(visible=True, alpha=0.3)
    if len(labels) <= _FEW_LABELS:
        axes.legend(fontsize=8, loc="best")
    else:
        figure.set_figwidth(11.0)
        axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.savefig(path, metadata={"Software": None})


def layer_heatmaps(path: Path, analysis: Analysis) -> None:
    """Draw rank-1 energy and R² of its coordinate by layer and module type; grey is what does not move or exist.

    What lies outside the layers has a row of its own. Writes a PNG.
    """
    columns = [part.module for part in analysis.modules]
    layers = sorted({part.layer for part in analysis.cells if part.layer is not None})
    rows: list[int | None] = [*layers, None] if any(part.layer is None for part in analysis.cells) else list(layers)
    size = (2 * (0.42 * len(columns) + 1.6), 0.26 * len(rows) + 2.4)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("rank-1 energy", "R² of the leading coordinate on the step")
    for axes, title, read in zip(panels, titles, (attrgetter("energy"), attrgetter("r_squared")), strict=True):
        values = np.full((len(rows), len(columns)), np.nan)
        for part in analysis.cells:
            number = read(part)
            values[rows.index(part.layer), columns.index(part.module)] = np.nan if number is None else number
        _heatmap(figure, axes, values)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
        axes.set_yticks(range(len(rows)), ["none" if row is None else str(row) for row in rows], fontsize=8)
    panels[0].set_ylabel("layer")
    figure.suptitle(f"{analysis.run}: steps {analysis.steps[0]} to {analysis.steps[-1]}", fontsize=10)
    figure.savefig(path, metadata={"Software": None})


def _heatmap(figure: Figure, axes: Axes, values: NDArray[np.float64]) -> None:
    known = values[np.isfinite(values)]
    # Down to the tenth below the lowest: noise does not fill the scale, and a bad tensor still stands out.
    low = min(math.floor(10 * float(known.min())) / 10, 0.9) if len(known) else 0.0
    axes.set_facecolor("0.9")
    image = axes.imshow(values, vmin=low, vmax=1.0, cmap="viridis", aspect="auto", interpolation="none")
    figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    if len(values) > _ROWS_WITH_NUMBERS:
        return
    for (row, column), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.3f}".removeprefix("0")
            dark = value < _MIDDLE * (1.0 - low) + low
            axes.text(column, row, text, ha="center", va="center", fontsize=6, color="white" if dark else "black")


def coordinate_curves(path: Path, analysis: Analysis) -> None:
    """Draw the leading coordinates of the whole model by training step; writes a PNG.

    Beside them is how far the leading one of each module type is from steady motion away from the base.
    """
    figure = Figure(figsize=(13.0, 4.5), dpi=110, layout="constrained")
    whole, modules = figure.subplots(1, 2)
    for number, (row, share) in enumerate(zip(analysis.coordinates, analysis.energies, strict=True), start=1):
        whole.plot(
            analysis.steps, row, marker=".", markersize=3, linewidth=1.0, label=f"{number}: {share:.2%} of energy"
        )
    whole.set_title("leading coordinates of the whole model", fontsize=10)
    whole.set_ylabel("share of the latest delta's norm")
    for number, (module, row) in enumerate(analysis.module_coordinates.items()):
        style = ("-", "--", ":")[number // 10 % 3]
        ahead = [value - step / analysis.steps[-1] for value, step in zip(row, analysis.steps, strict=True)]
        modules.plot(analysis.steps, ahead, linestyle=style, color=f"C{number % 10}", linewidth=1.0, label=module)
    modules.set_title("leading coordinate of each module type: ahead of steady motion", fontsize=10)
    modules.set_ylabel("share of its last value")
    for axes in (whole, modules):
        axes.axhline(0.0, color="0.6", linewidth=0.6)
        axes.set_xlabel("training step")
        axes.grid(visible=True, alpha=0.3)
    whole.legend(fontsize=7, loc="best")
    modules.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    figure.suptitle(f"{analysis.run}: steps {analysis.steps[0]} to {analysis.steps[-1]}", fontsize=10)
    figure.savefig(path, metadata={"Software": None})


def r_squared_histograms(path: Path, moments: Mapping[str, Moments]) -> None:
    """Draw R² on the step of many single values, a panel each kind, as shares of those that change; a PNG."""
    figure = Figure(figsize=(6.0 * len(moments), 4.0), dpi=110, layout="constrained")
    edges = np.linspace(0.0, 1.0, BINS + 1)
    for axes, (what, moment) in zip(figure.subplots(1, len(moments), squeeze=False)[0], moments.items(), strict=True):
        axes.stairs(np.array(moment.counts) / max(moment.kept, 1), edges, fill=True, alpha=0.7)
        if moment.quartiles is not None:
            axes.axvline(moment.quartiles[1], color="black", linestyle="--", label=f"median {moment.quartiles[1]:.3f}")
            axes.legend(fontsize=8, loc="upper left")
        axes.set_title(f"{what}: {moment.kept} of {moment.drawn} change enough", fontsize=10)
        axes.set_xlabel("R² on the training step")
        axes.set_ylabel("share of them")
        axes.set_xlim(0.0, 1.0)
    figure.savefig(path, metadata={"Software": None})
