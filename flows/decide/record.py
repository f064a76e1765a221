"""A decision in MLflow: a run with what decided, a run below it for each candidate, and accuracy by step as curves."""

from collections.abc import Iterator
from pathlib import Path

from deploy import runs
from deploy.runs import Recorded
from flows.settings import Settings
from flows.state.decision import Decision, Score, gate_metrics
from flows.state.windows import window_directory

# The curve of what really was, in MLflow.
OBSERVED = "observed"


def record(settings: Settings, decision: Decision, *, tracking_uri: str) -> Recorded:
    """Record the decision, complete or not at all; again it is the same runs."""
    name, key = settings.registered_model, f"{decision.training_run} {decision.key}"
    directory = window_directory(settings, decision.key)
    recorded = runs.record(
        name,
        tracking_uri=tracking_uri,
        key=key,
        title=f"{decision.training_run} window {decision.window}",
        parameters=_parameters(settings, decision),
        metrics=metrics(decision),
        tags={"verdict": decision.verdict, "reason": decision.reason},
        artifacts=[path for path in (directory / "decision.md", directory / "accuracy.png") if path.is_file()],
    )
    for score in _candidates(decision):
        runs.record(
            name,
            tracking_uri=tracking_uri,
            key=f"{key} {score.model.title}",
            title=score.model.title,
            parameters={
                "method": score.model.method,
                "target_step": score.model.step,
                "observed_steps": len(decision.steps),
                "window": decision.window,
                "base": settings.base,
                "digest": score.model.digest,
            },
            metrics=_measured(decision, score),
            tags={"verdict": decision.verdict if score.model == decision.winner else "not chosen"},
            artifacts=[path for path in (Path(score.model.directory) / "relex.json",) if path.is_file()],
            parent=recorded.run_id,
        )
    for series, points in curves(decision).items():
        runs.log_series(
            name,
            points,
            tracking_uri=tracking_uri,
            series=f"{decision.training_run} {series}",
            metric="report_accuracy",
        )
    return recorded


def metrics(decision: Decision) -> dict[str, float]:
    """Return the numbers that decided, and what choosing cost."""
    answers, seconds = decision.cost
    numbers = {"selection_answers": float(answers), "selection_seconds": seconds} if answers else {}
    for score in decision.selection:
        if score.model == decision.winner:
            numbers["selection_accuracy"] = score.accuracy
    return numbers | gate_metrics(decision.gates)


def curves(decision: Decision) -> dict[str, dict[int, float]]:
    """Return accuracy on the first report benchmark by training step: the observed curve, and one for each method."""
    accuracies: dict[str, dict[int, float]] = {}
    for score in decision.report:
        if score.benchmark == decision.report[0].benchmark:
            method = score.model.method
            name = f"{method} from step {decision.window}" if method else OBSERVED
            accuracies.setdefault(name, {})[score.model.step] = score.accuracy
    return accuracies


def _parameters(settings: Settings, decision: Decision) -> dict[str, object]:
    parameters: dict[str, object] = {
        "window": decision.window,
        "targets": settings.targets,
        "methods": settings.methods,
        "attempt": f"{decision.attempt} of {decision.attempts}",
        "base": settings.base,
        "checkpoints": settings.checkpoints,
        "steps": ", ".join(map(str, decision.steps)),
        "window_digest": decision.key,
    }
    if decision.backtested is not None:
        parameters["backtest"] = decision.backtested.state
    return parameters


def _candidates(decision: Decision) -> Iterator[Score]:
    yield from (score for score in (*decision.selection, *decision.dropped) if score.model.role == "candidate")


def _measured(decision: Decision, score: Score) -> dict[str, float]:
    numbers = {"selection_accuracy": score.accuracy, "selection_problems": float(score.n)}
    if score.model.skill_at_least is not None:
        numbers["skill_at_least"] = score.model.skill_at_least
    for reported in decision.report:
        if reported.model == score.model:
            numbers[f"report_accuracy/{reported.benchmark}"] = reported.accuracy
    return numbers
