"""How a decision is shown: progress and pages in Prefect, a figure, numbers and curves for MLflow."""

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.decide.page import page
from flows.state.decision import Decision, Model, Score, gate_metrics
from relex import plots

# A progress artifact is a row in the server's database: more than one a second is noise.
_PROGRESS_SECONDS = 1.0
# The curve of what really was, in MLflow.
OBSERVED = "observed"


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


def draw(decision: Decision, path: Path, *, later: Sequence[Score] = ()) -> Path | None:
    """Draw accuracy by training step on the first report benchmark to `path`; None when there is no such benchmark.

    `later` is what the run really reached after the decision.
    """
    if not decision.report:
        return None
    benchmark = decision.report[0].benchmark
    scores = [score for score in decision.report if score.benchmark == benchmark]
    winner = decision.winner if decision.verdict == "registered" else None
    plots.accuracy_by_step(
        path,
        title=f"{decision.training_run}: {decision.verdict}",
        benchmark=f"{benchmark}, {scores[0].n} problems that decided nothing",
        window=(decision.steps[0], decision.steps[-1]),
        real=[_point(score) for score in scores if score.model.role in ("base", "observed")],
        predicted=[_point(score, winner) for score in scores if score.model.role == "candidate"],
        later=[_point(score) for score in later],
    )
    return path


def _point(score: Score, winner: Model | None = None) -> plots.Point:
    return plots.Point(
        score.model.step, score.accuracy, score.standard_error, score.model.method, chosen=score.model == winner
    )


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
    found = {}
    for score in decision.selection:
        if score.model == decision.winner:
            found["selection_accuracy"] = score.accuracy
    return found | gate_metrics(decision.gates)


def curves(decision: Decision) -> dict[str, dict[int, float]]:
    """Return accuracy on the first report benchmark by training step: the observed curve, and one for each method."""
    found: dict[str, dict[int, float]] = {}
    for score in decision.report:
        if score.benchmark == decision.report[0].benchmark:
            method = score.model.method
            name = f"{method} from step {decision.window}" if method else OBSERVED
            found.setdefault(name, {})[score.model.step] = score.accuracy
    return found
