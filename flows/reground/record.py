"""A re-grounding in MLflow: a run for each cycle, and the accuracy by step as a curve."""

from dataclasses import asdict

from deploy import runs
from flows.reground.cycle import Cycle
from flows.reground.loop import Regrounding
from flows.reground.settings import RegroundSettings


def record(settings: RegroundSettings, regrounding: Regrounding, *, tracking_uri: str) -> None:
    """Record every finished cycle, each complete or not at all; again it is the same runs."""
    name = settings.training_run
    for cycle in regrounding.cycles:
        runs.record(
            name,
            tracking_uri=tracking_uri,
            key=f"{settings.home} cycle {cycle.number}",
            title=f"cycle {cycle.number}",
            parameters={"method": cycle.method, "base": cycle.base, "start_step": cycle.start_step},
            metrics=_metrics(cycle),
            tags={"reason": cycle.reason, "jump": "kept" if cycle.jumped_steps else "not kept"},
            artifacts=[settings.cycle_directory(cycle.number) / "cycle.json"],
        )
    runs.log_series(
        name,
        {0: regrounding.start.accuracy} | {cycle.end_step: cycle.accuracy for cycle in regrounding.cycles},
        tracking_uri=tracking_uri,
        series=f"{name} re-grounded",
        metric="selection_accuracy",
    )


def _metrics(cycle: Cycle) -> dict[str, float]:
    names = (
        "real_steps",
        "jumped_steps",
        "accuracy",
        "observed_accuracy",
        "jumped_accuracy",
        "answers",
        "training_seconds",
        "jump_seconds",
        "scoring_seconds",
    )
    return {name: float(value) for name, value in asdict(cycle).items() if name in names and value is not None}
