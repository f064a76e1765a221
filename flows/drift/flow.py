"""Drift as a Prefect flow: when the run reaches a step that was predicted, compare the two, log it, warn.

The watcher sends `relex.target.reached` (see flows.drift.announce) until the comparison is kept and shown; the flow
compares all that is due, shows it, and says so last, so that it may be killed at any moment and started again.
"""

import logging
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.states import Completed

from deploy import registry, runs
from deploy.observed import BEST, best_digest, keep_best
from deploy.versions import OVERTAKEN
from flows.decide.record import OBSERVED
from flows.drift.due import look
from flows.drift.measure import compare
from flows.drift.page import observed, overtaken, page, summary, warnings
from flows.drift.record import Compared, comparing, mark_shown, read_compared, was_shown
from flows.log import show_own_lines
from flows.observed.score import catch_up
from flows.progress import ProgressArtifact, log_result
from flows.run_names import flow_run_name
from flows.settings import Settings, load_settings
from flows.state.events import PREDICTION_DRIFTED, event
from flows.state.failure import keep_failure
from flows.state.scored import Scored, best, read_scored
from relex.files.block_cache import BlockCache

logger = logging.getLogger(__name__)


def compare_reached(settings: Settings) -> int:
    """Compare everything that is due; return how much that was."""
    progress = ProgressArtifact(f"drift-progress-{settings.training_run}", "drift")
    with BlockCache(settings.home, size=int(settings.cache)) as blocks:
        comparable = look(settings, blocks=blocks)
        if comparable is None:
            return 0
        base, due, _ = comparable
        return len(compare(settings, base, due, tell=progress))


def log_compared(settings: Settings, tracking_uri: str) -> None:
    """Log the skill of every prediction in MLflow, a curve a method and window, and the real accuracy beside it.

    A registered version that a real checkpoint beats is tagged with its step and by how much.
    """
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for row in read_compared(settings):
        # A comma is no letter of MLflow's keys.
        series = f"{settings.training_run} {row.method} from step {row.observed} drift".replace(",", " ")
        if row.drift is not None and row.drift.skill is not None:
            curves.setdefault((series, "weight_skill"), {})[row.step] = row.drift.skill
        for pair in row.accuracies:
            curves.setdefault((series, f"real_accuracy/{pair.benchmark}"), {})[row.step] = pair.real
    for (series, metric), points in curves.items():
        runs.log_series(settings.registered_model, points, tracking_uri=tracking_uri, series=series, metric=metric)
    tag_overtaken(settings, tracking_uri)


def tag_overtaken(settings: Settings, tracking_uri: str) -> None:
    """Tag each registered version that a real checkpoint beats with its step and by how much."""
    rows: list[Compared | Scored] = [*read_compared(settings), *read_scored(settings)]
    for row in sorted(rows, key=lambda row: row.step):
        against = row.overtaken
        if against is not None:
            version = int(against.registered.rpartition(" ")[2])
            registry.tag(settings.registered_model, version, {OVERTAKEN: against.short}, tracking_uri=tracking_uri)


def score_observed(settings: Settings, tracking_uri: str) -> None:
    """Score the observed checkpoints that are due, log accuracy by training step in MLflow, and keep the best there."""
    progress = ProgressArtifact(f"observed-{settings.training_run}", "observed")
    with BlockCache(settings.home, size=int(settings.cache)) as blocks:
        rows = catch_up(settings, blocks=blocks, tell=progress)
    points = {row.step: row.score.accuracy for row in rows if row.score is not None}
    runs.log_series(
        settings.registered_model,
        points,
        tracking_uri=tracking_uri,
        series=f"{settings.training_run} {OBSERVED} on selection",
        metric="selection_accuracy",
    )
    for line in (*overtaken(rows), *observed(settings, rows)):
        log_result(line)
    tag_overtaken(settings, tracking_uri)
    chosen = best(rows, {})
    if chosen is None or chosen.model.digest == best_digest(settings.registered_model, tracking_uri=tracking_uri):
        return
    done = keep_best(
        Path(chosen.model.directory),
        name=settings.registered_model,
        tracking_uri=tracking_uri,
        metrics={"selection_accuracy": chosen.accuracy},
        tags={
            "step": str(chosen.model.step),
            "method": OBSERVED,
            "selection_accuracy": f"{chosen.accuracy:.4f}",
            "verdict": "not gated",
            "training_run": settings.training_run,
        },
    )
    log_result(f"{BEST}: step {chosen.model.step}, {done.name} version {done.version}")


compare_task = task(name="compare", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)(compare_reached)
score_task = task(name="score observed", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)(score_observed)
log_task = task(name="log", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(log_compared)


@flow(
    name="drift",
    flow_run_name=flow_run_name(lambda run, given: f"drift of {run} at step {given.get('step', 0)}"),
    on_failure=[keep_failure],
)
def drift(config: str, tracking_uri: str, step: int = 0) -> State[Any]:
    """Compare old predictions of the training run described in the file `config` with what it has reached."""
    show_own_lines()
    settings = load_settings(Path(config))
    with comparing(settings) as mine:
        if not mine:
            return Completed(message=f"what was reached by step {step} is being compared by another process")
        compare_task(settings)
        if settings.score_every is not None:
            score_task(settings, tracking_uri)
        rows = read_compared(settings)
        new = [row for row in rows if not was_shown(settings, row)]
        if not new:
            return Completed(message="nothing new is to be compared")
        log_task(settings, tracking_uri)
        create_markdown_artifact(
            page(settings.training_run, rows),
            key=f"drift-{settings.training_run}",
            description=" ".join([*overtaken(rows), summary(rows)]),
        )
        for row in new:
            _warn(settings, row)
            mark_shown(settings, row)
    return Completed(message=" ".join([*overtaken(rows), summary(rows)]))


def _warn(settings: Settings, row: Compared) -> None:
    for text in (*overtaken([row]), *warnings([row])):
        logger.warning("%s", text)
    if row.broken:
        drifted = event(PREDICTION_DRIFTED, settings, f"{row.key} {row.method} {row.target}", _payload(settings, row))
        emit_event(drifted.name, {"prefect.resource.id": drifted.resource}, payload=drifted.payload, id=drifted.id)


def _payload(settings: Settings, row: Compared) -> dict[str, Any]:
    kept = ("key", "method", "target", "step", "promised", "registered")
    skill = row.drift.skill if row.drift is not None else None
    return {"training_run": settings.training_run, **{name: getattr(row, name) for name in kept}, "skill": skill}
