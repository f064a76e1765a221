"""Old predictions are compared with what the run has reached: the weights always, the accuracy when it is asked for.

It decides nothing.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from evaluation.answers.harness import Progress
from evaluation.child import kept_children
from flows.decide.score import reports
from flows.drift.due import Reached, Waiting, look, planned_end
from flows.drift.finish import finish, unfinished
from flows.drift.record import Compared, comparing, keep, read_compared
from flows.observed.model import write_observed
from flows.settings import Settings
from flows.state.decision import Model
from flows.state.overtaken import Paired
from flows.state.snapshot import look_at
from flows.study.compare import difference
from relex.drift import drift
from relex.errors import (
    CheckpointChangedError,
    CheckpointDamagedError,
    CheckpointMismatchError,
    NonFiniteError,
)
from relex.files.block_cache import BlockCache
from relex.layouts.weights import Weights
from relex.progress import Tell, telling
from relex.store import Checkpoint

logger = logging.getLogger(__name__)


def catch_up(
    settings: Settings, *, blocks: BlockCache | None = None, tell: Tell | None = None
) -> tuple[list[Compared], list[Waiting]]:
    """Compare what can be compared now; return every comparison made so far, and what is not compared and why.

    What another process is comparing now is among the latter. Raises RelexError, EvaluationError.
    """
    with comparing(settings) as mine:
        comparable = look(settings, blocks=blocks)
        if comparable is None:
            return read_compared(settings), []
        base, due, waiting = comparable
        if mine:
            compare(settings, base, due, tell=tell)
        else:
            waiting += [
                Waiting(
                    prediction.before.method,
                    prediction.before.target,
                    prediction.before.observed,
                    "another process is at it",
                )
                for prediction in due
            ]
    return read_compared(settings), waiting


@kept_children()
def compare(settings: Settings, base: Weights, due: Sequence[Reached], *, tell: Tell | None = None) -> list[Compared]:
    """Compare what was reached, keep it, and return it; what is removed by the trainer meanwhile is left out.

    The weights are kept before the accuracy is asked for, which may take hours. Raises RelexError, EvaluationError.
    """
    compared = []
    for prediction in sorted(due, key=lambda prediction: prediction.real.step):
        try:
            compared.append(_compare(settings, base, prediction, tell=tell))
        except CheckpointChangedError as error:
            # It may have been pruned, or written anew: the next look sees which.
            logger.warning(
                "%s cannot be compared with step %d: %s", prediction.before.title, prediction.real.step, error
            )
    finish(settings, partial(_at_end, settings, base, _end(settings), tell=tell))
    # Reports of its content are kept, the copy is of no more use.
    shutil.rmtree(_real_models(settings), ignore_errors=True)
    return compared


def _compare(settings: Settings, base: Weights, prediction: Reached, *, tell: Tell | None) -> Compared:
    row = prediction.before
    if row.drift is None and not row.problem:
        try:
            measured = drift(
                base,
                prediction.real,
                predicted=Path(prediction.predicted.directory),
                observed=Path(prediction.observed.directory),
                memory=int(settings.memory),
                threads=settings.threads,
                on_progress=telling(tell, f"compare {row.title}"),
            )
            row = replace(row, drift=measured)
        except (CheckpointDamagedError, CheckpointMismatchError, NonFiniteError) as error:
            # Trying again would find the same.
            row = replace(row, problem=str(error))
        keep(settings, row)
    if settings.drift == "accuracy":
        row = replace(
            row, asked="accuracy", accuracies=_accuracies(settings, base, prediction, tell) if row.drift else ()
        )
        keep(settings, row)
    return row


def _end(settings: Settings) -> Checkpoint | None:
    if not unfinished(settings):
        return None
    now = look_at(settings, settings.checkpoints)
    return planned_end(settings, now.stored, now.ever)


def _at_end(
    settings: Settings, base: Weights, end: Checkpoint | None, winner: Model, benchmark: str, *, tell: Tell | None
) -> tuple[int, Paired] | None:
    if end is None:
        return None
    try:
        (pair,) = _paired(settings, base, winner, end, [benchmark], tell=tell)
    except (CheckpointChangedError, CheckpointDamagedError, CheckpointMismatchError, NonFiniteError) as error:
        logger.warning("%s cannot be compared with the end, step %d: %s", winner.title, end.step, error)
        return None
    return end.step, pair


def _accuracies(settings: Settings, base: Weights, prediction: Reached, tell: Tell | None) -> tuple[Paired, ...]:
    if not prediction.benchmarks:
        return ()
    return _paired(settings, base, prediction.predicted, prediction.real, prediction.benchmarks, tell=tell)


def _paired(
    settings: Settings,
    base: Weights,
    predicted: Model,
    checkpoint: Checkpoint,
    benchmarks: Sequence[str],
    *,
    tell: Tell | None,
) -> tuple[Paired, ...]:
    real = write_observed(settings, base, checkpoint, _real_models(settings))

    def on_progress(step: Progress) -> None:
        if tell is not None:
            tell(f"{step.benchmark} @ {checkpoint.step}", step.done, step.total)

    pairs = zip(
        reports(settings, predicted, benchmarks),
        reports(settings, real, benchmarks, on_progress=on_progress),
        strict=True,
    )
    return tuple(
        Paired(one.benchmark, one.n, one.accuracy, other.accuracy, *difference(one, other)) for one, other in pairs
    )


def _real_models(settings: Settings) -> Path:
    return settings.home / "drift" / "real"
