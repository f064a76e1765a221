"""Scores of one training run's models, all under the same evaluation settings and in one cache."""

from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation.answers.harness import Progress, evaluate
from evaluation.verdict.report import Report
from flows.settings import Settings
from flows.state.decision import Model


def reports(
    settings: Settings,
    model: Model,
    benchmarks: Sequence[str],
    *,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Report]:
    """Return the reports of one model, in the order of the benchmarks; what was answered before is not asked again.

    `limit` scores the first problems only.
    """
    evaluated = evaluate(
        Path(model.directory),
        benchmarks,
        cache=settings.home / "evaluations",
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        limit=limit,
        backend=settings.backend,
        evaluations=settings.evaluations,
        on_progress=on_progress,
    )
    return [each.report for each in evaluated]
