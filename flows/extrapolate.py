"""The main flow: predict, score, gate, register.

Prefect adds retries and a picture; every step is complete or absent without it.

The flow is started by `relex.window.ready`, holds the window while it works, and writes the decision last. Killed at
any moment and started again, it takes up what is there and ends in the same decision and the same single version.
"""

import base64
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed

from deploy import registry, runs
from evaluation.gate import Gate, gate
from evaluation.harness import Progress, evaluate
from evaluation.report import Report
from flows.decision import Decision, Model, Score, choose, page
from flows.ledger import claim, decided, decision_path, window_directory, write_json
from flows.predict import predict
from flows.settings import Settings, load_settings
from relex import plots
from relex.errors import NonFiniteError, TargetError

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


def predict_models(config: str, steps: list[int], key: str) -> list[Model]:
    """Write the candidates of one window and the last observed checkpoint."""
    settings = load_settings(Path(config))
    progress = ProgressArtifact(f"predict-{settings.training_run}", "predict")
    return predict(settings, steps, key, on_progress=progress)


def score_model(config: str, model: Model, benchmarks: list[str]) -> list[Score]:
    """Score one model on the benchmarks; answers already given are not asked for again."""
    settings = load_settings(Path(config))
    progress = ProgressArtifact(f"score-{settings.training_run}", f"score {model.title}")

    def show(step: Progress) -> None:
        progress(f"{step.benchmark} {step.done}/{step.total}", step.done, step.total)

    return [
        Score(model, report.benchmark, report.accuracy, report.standard_error, report.n)
        for report in reports(settings, model, benchmarks, on_progress=show)
    ]


def reports(settings: Settings, model: Model, benchmarks: Sequence[str], **options: Any) -> list[Report]:
    """Return the reports of one model under this training run's evaluation settings."""
    return evaluate(
        Path(model.directory),
        benchmarks,
        cache=settings.home / "evaluations",
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        **options,
    )


def gate_model(config: str, winner: Model, references: list[Model]) -> list[Gate]:
    """Compare the chosen candidate with each reference on the gate benchmark, problem by problem."""
    settings = load_settings(Path(config))
    candidate = reports(settings, winner, [settings.gate])[0]
    return [
        replace(
            gate(
                candidate,
                reports(settings, reference, [settings.gate])[0],
                # Non-inferior to what was observed, but better than what people already use.
                margin=settings.margin if reference.role == "observed" else 0.0,
                confidence=settings.confidence,
            ),
            candidate=winner.title,
            reference=reference.title,
        )
        for reference in references
    ]


def register_decision(config: str, decision: Decision, tracking_uri: str) -> Decision:
    """Record the decision in MLflow and, if the gate was passed, register the winner; return it with the addresses."""
    settings = load_settings(Path(config))
    name = settings.registered_model
    directory = window_directory(settings, decision.key)
    recorded = runs.record(
        name,
        tracking_uri=tracking_uri,
        key=f"{decision.training_run} {decision.key}",
        title=f"{decision.training_run} window {decision.window}",
        parameters={"window": decision.window, "targets": settings.targets, "methods": settings.methods},
        metrics=_metrics(decision),
        tags={"verdict": decision.verdict, "reason": decision.reason},
        artifacts=[path for path in (directory / "decision.md", directory / "accuracy.png") if path.is_file()],
    )
    for series, points in _curves(decision).items():
        runs.log_series(
            name,
            points,
            tracking_uri=tracking_uri,
            series=f"{decision.training_run} {series}",
            metric="report_accuracy",
        )
    decision = replace(decision, record_url=recorded.url or "")
    if decision.verdict != "registered" or decision.winner is None:
        return decision
    done = registry.register(
        Path(decision.winner.directory),
        name=name,
        tracking_uri=tracking_uri,
        run_id=recorded.run_id,
        metrics=_metrics(decision),
        tags={"verdict": decision.verdict, "training_run": decision.training_run, "window": str(decision.window)},
    )
    return replace(decision, registered=f"{done.name} version {done.version}", registered_url=done.url or "")


def find_champion(config: str, tracking_uri: str) -> list[Model]:
    """Return the champion of this registered model, if there is one."""
    settings = load_settings(Path(config))
    found = registry.champion(settings.registered_model, tracking_uri=tracking_uri)
    return [Model("champion", found.target_step, found.weights, digest=found.digest)] if found else []


# Retried is what a second attempt can mend: a child killed for memory, a checkpoint that was being replaced, a server
# away.
predict_task = task(name="predict", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)(predict_models)
score_task = task(
    name="score",
    task_run_name="score {model.role} {model.step}",
    retries=2,
    retry_delay_seconds=2,
    cache_policy=NO_CACHE,
)(score_model)
gate_task = task(name="gate", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE)(gate_model)
champion_task = task(name="champion", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(find_champion)
register_task = task(name="register", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(register_decision)


@flow(name="extrapolate", flow_run_name="extrapolate {key}")
def extrapolate(config: str, steps: list[int], key: str, tracking_uri: str) -> State[Any]:
    """Decide one window of the training run described in the file `config`."""
    settings = load_settings(Path(config))
    with claim(settings, key) as mine:
        if not mine:
            return Completed(message=f"window {key} is being decided by another flow run")
        if decided(settings, key):
            return Completed(message=f"window {key} is decided")
        try:
            decision = decide(config, settings, steps, key, tracking_uri)
        except (NonFiniteError, TargetError) as error:
            # Trying again would find the same: it is a decision, and "no" is an answer.
            decision = Decision(
                settings.training_run, key, settings.window, tuple(steps), "keep training", f"Cannot predict: {error}"
            )
        figure = draw(settings, decision)
        directory = window_directory(settings, key)
        directory.joinpath("decision.md").write_text(page(decision), encoding="utf-8")
        decision = register_task(config, decision, tracking_uri)
        show(decision, figure)
        write_json(decision_path(settings, key), decision.to_json())
    return Completed(message=f"{decision.verdict}: {decision.registered or decision.reason}")


def decide(config: str, settings: Settings, steps: list[int], key: str, tracking_uri: str) -> Decision:
    """Predict, score, choose and gate."""
    models = predict_task(config, steps, key)
    observed = models[0]
    base = Model("base", 0, str(settings.base))
    selection: list[Score] = []
    report: list[Score] = list(score_task(config, base, settings.report)) if settings.report else []
    for model in models:
        first, *rest = score_task(config, model, [settings.selection, *settings.report])
        selection.append(first)
        report += rest
    chosen, reason = choose(selection)
    common = Decision(
        settings.training_run,
        key,
        settings.window,
        tuple(steps),
        "keep training",
        reason,
        selection=tuple(selection),
        report=tuple(report),
    )
    if chosen is None:
        return common
    references = [observed, *champion_task(config, tracking_uri)]
    gates = tuple(gate_task(config, chosen.model, references))
    common = replace(common, winner=chosen.model, gates=gates)
    failed = [item for item in gates if not item.passed]
    if failed:
        return replace(common, reason=f"Not shown to be worth having. {' '.join(item.sentence for item in failed)}")
    return replace(common, verdict="registered", reason=" ".join(item.sentence for item in gates))


def draw(settings: Settings, decision: Decision) -> Path | None:
    """Draw accuracy by training step on the first report benchmark, if there is one."""
    if not decision.report:
        return None
    benchmark = decision.report[0].benchmark
    scores = [score for score in decision.report if score.benchmark == benchmark]
    path = window_directory(settings, decision.key) / "accuracy.png"
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


def _metrics(decision: Decision) -> dict[str, float]:
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


def _curves(decision: Decision) -> dict[str, dict[int, float]]:
    """Return accuracy on the first report benchmark by training step: the observed curve, and one for each method."""
    curves: dict[str, dict[int, float]] = {}
    for score in decision.report:
        if score.benchmark == decision.report[0].benchmark:
            curves.setdefault(score.model.method or "observed", {})[score.model.step] = score.accuracy
    return curves
