"""A decision in MLflow: a run with what decided, a run below it for each candidate, and accuracy by step as curves."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy import runs
from deploy.runs import Dataset, Recorded
from evaluation.benchmarks.benchmark import resolve_benchmark
from evaluation.errors import EvaluationError
from flows.settings import Settings
from flows.state.decision import Decision, Score, divergence_metrics, gate_metrics, guard_metrics
from flows.state.windows import window_directory

# The curve of what really was, in MLflow.
OBSERVED = "observed"


def record(settings: Settings, decision: Decision, *, tracking_uri: str) -> Recorded:
    """Record the decision, complete or not at all; again it is the same runs."""
    name, key = settings.registered_model, f"{decision.training_run} {decision.key}"
    directory = window_directory(settings, decision.key)
    measured_on = datasets(settings)
    recorded = runs.record(
        name,
        tracking_uri=tracking_uri,
        key=key,
        title=f"{decision.training_run} window {decision.window}",
        parameters=_parameters(settings, decision),
        metrics=metrics(decision),
        datasets=measured_on,
        description=describe(settings, decision),
        tags=tags(decision) | {"reason": decision.reason},
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
            datasets=measured_on,
            description=_describe_candidate(settings, decision, score),
            tags={
                "step": str(score.model.step),
                "method": score.model.method,
                "accuracy": f"{score.accuracy:.4f}",
                "verdict": decision.verdict if score.model == decision.winner else "not chosen",
            },
            artifacts=[path for path in (Path(score.model.directory) / "relex.json",) if path.is_file()],
            parent=recorded.run_id,
        )
    for metric, series in (("report_accuracy", curves(decision)), ("selection_accuracy", chosen_by(decision))):
        for title, points in series.items():
            runs.log_series(
                name,
                points,
                tracking_uri=tracking_uri,
                series=f"{decision.training_run} {title}",
                metric=metric,
            )
    return recorded


def tags(decision: Decision) -> dict[str, str]:
    """Return what a person looks for first: step, method, accuracy, what was beaten by how much, and the verdict."""
    winner = decision.winner
    if winner is None:
        return {"verdict": decision.verdict}
    human = {"step": str(winner.step), "method": winner.method}
    if decision.gates:
        human["accuracy"] = f"{decision.gates[0].candidate_accuracy:.4f}"
        human["beat"] = ", ".join(
            f"{gate.reference} by {100 * gate.difference:+.2f} points" for gate in decision.gates if gate.passed
        )
    if decision.guards:
        human["guards"] = ", ".join(f"{guard.benchmark}: {guard.verdict}" for guard in decision.guards)
    return {**human, "verdict": decision.verdict, "training_run": decision.training_run, "window": str(decision.window)}


def describe(settings: Settings, decision: Decision) -> str:
    """Return, as Markdown, what a page of MLflow says of a decision and of what it registered."""
    winner = decision.winner
    lines = [f"**{decision.verdict}**: {decision.reason}"]
    if winner is not None:
        lines.append(
            f"{winner.title}: the weights of training run `{settings.checkpoints}` as they are predicted for step"
            f" {winner.step}, by {winner.method} from {len(decision.steps)} checkpoints, steps {decision.steps[0]} to"
            f" {decision.window}, on base `{settings.base}`."
        )
    if decision.page_url:
        lines.append(f"[How it was decided]({decision.page_url})")
    return "\n\n".join(lines)


def _describe_candidate(settings: Settings, decision: Decision, score: Score) -> str:
    kept = "went to the gate" if score.model == decision.winner else "was not chosen"
    return (
        f"{score.model.title} of `{settings.checkpoints}`, from step {decision.window}: {score.accuracy:.4f} on"
        f" {score.n} problems of {score.benchmark}, and {kept}."
    )


def datasets(settings: Settings) -> dict[str, Dataset]:
    """Return what is measured on what, by the beginning of a metric; a benchmark that is gone by now is left out."""
    by_metric: dict[str, Dataset] = {}
    for given, metric in (
        (settings.selection, "selection_accuracy"),
        (settings.gate, "gate_"),
        *((each, "guard") for each in settings.guards),
        *((each, "") for each in settings.report),
    ):
        try:
            benchmark = resolve_benchmark(given)
        except EvaluationError:
            continue
        named = {"": f"report_accuracy/{benchmark.name}", "guard": f"guard/{benchmark.name}/"}
        by_metric[named.get(metric, metric)] = Dataset(benchmark.name, benchmark.digest)
    return by_metric


def metrics(decision: Decision) -> dict[str, float]:
    """Return the numbers that decided, and what choosing cost."""
    answers, seconds = decision.cost
    numbers = {"selection_answers": float(answers), "selection_seconds": seconds} if answers else {}
    for score in decision.selection:
        if score.model == decision.winner:
            numbers["selection_accuracy"] = score.accuracy
    return (
        numbers
        | gate_metrics(decision.gates)
        | guard_metrics(decision.guards)
        | divergence_metrics(decision.divergence)
    )


def curves(decision: Decision) -> dict[str, dict[int, float]]:
    """Return accuracy on the first report benchmark by training step: the observed curve, and one for each method."""
    return _by_method(decision, [score for score in decision.report if score.benchmark == decision.report[0].benchmark])


def chosen_by(decision: Decision) -> dict[str, dict[int, float]]:
    """Return the same of the selection problems: the observed point, and what was scored on all of them."""
    return {f"{name} on selection": points for name, points in _by_method(decision, decision.selection).items()}


def _by_method(decision: Decision, scores: Sequence[Score]) -> dict[str, dict[int, float]]:
    accuracies: dict[str, dict[int, float]] = {}
    for score in scores:
        name = f"{score.model.method} from step {decision.window}" if score.model.method else OBSERVED
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
