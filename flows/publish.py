"""How a decision is shown: progress and pages in Prefect, a figure, numbers and curves for MLflow."""

import base64
import time
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.decision import Decision, Score, page
from relex import plots

# A progress artifact is a row in the server's database: more than one a second is noise.
_PROGRESS_SECONDS = 1.0


class ProgressArtifact:
    """One line of progress in the Prefect UI; the text carries the numbers, since the UI hides the percentage."""

    def __init__(self, key: str, title: str) -> None:
        self._title = title
        self._last = time.monotonic()
        self._artifact: Any = create_progress_artifact(0.0, key=key, description=title)

    def __call__(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        if done < total and time.monotonic() - self._last < _PROGRESS_SECONDS:
            return
        self._last = time.monotonic()
        share = 100.0 * done / max(total, 1)
        update_progress_artifact(self._artifact, share, description=f"{self._title}: {what} {share:.0f} %")


def draw(decision: Decision, path: Path) -> Path | None:
    """Draw accuracy by training step on the first report benchmark to `path`; None when there is no such benchmark."""
    if not decision.report:
        return None
    benchmark = decision.report[0].benchmark
    scores = [score for score in decision.report if score.benchmark == benchmark]
    plots.accuracy_by_step(
        path,
        title=f"{decision.training_run}: {decision.verdict}",
        benchmark=f"{benchmark}, {scores[0].n} problems",
        window=(decision.steps[0], decision.steps[-1]),
        real=[point(score) for score in scores if score.model.role in ("base", "observed")],
        predicted=[
            point(score, chosen=decision.winner == score.model and decision.verdict == "registered")
            for score in scores
            if score.model.role == "candidate"
        ],
    )
    return path


def point(score: Score, *, chosen: bool = False) -> plots.Point:
    """Return a score as a point of the figure."""
    return plots.Point(score.model.step, score.accuracy, score.standard_error, score.model.method, chosen)


def show(decision: Decision, figure: Path | None) -> None:
    """Put the decision where the Prefect UI shows it: a table and a page with the figure."""
    rows = [
        {"model": score.model.title, "benchmark": score.benchmark, "accuracy": f"{score.accuracy:.4f}", "n": score.n}
        for score in (*decision.selection, *decision.report)
    ]
    if rows:
        create_table_artifact(rows, key=f"scores-{decision.training_run}", description=decision.reason)
    uri = f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}" if figure is not None else ""
    create_markdown_artifact(
        page(decision, figure=uri), key=f"decision-{decision.training_run}", description=decision.reason
    )


def metrics(decision: Decision) -> dict[str, float]:
    """Return the numbers that decided."""
    metrics = {}
    for score in decision.selection:
        if decision.winner is not None and score.model == decision.winner:
            metrics["selection_accuracy"] = score.accuracy
    for item in decision.gates:
        role = item.reference.split(" @ ", maxsplit=1)[0].replace(" ", "_")
        metrics |= {
            "gate_accuracy": item.candidate_accuracy,
            f"gate_{role}_accuracy": item.reference_accuracy,
            f"gate_{role}_difference": item.difference,
            f"gate_{role}_lower_bound": item.lower_bound,
        }
    return metrics


def curves(decision: Decision) -> dict[str, dict[int, float]]:
    """Return accuracy on the first report benchmark by training step: the observed curve, and one for each method."""
    curves: dict[str, dict[int, float]] = {}
    for score in decision.report:
        if score.benchmark == decision.report[0].benchmark:
            curves.setdefault(score.model.method or "observed", {})[score.model.step] = score.accuracy
    return curves
