"""Scores of observed checkpoints as they appear: `score_every` steps apart, the newest first, on selection problems."""

import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from evaluation.answers.harness import Progress
from evaluation.child import kept_children
from evaluation.verdict.report import Report
from flows.decide.score import reports
from flows.observed.model import write_observed
from flows.search.ladder import score
from flows.settings import Settings
from flows.state.ledger import Seen
from flows.state.lock import held
from flows.state.overtaken import Against, Paired
from flows.state.scored import Scored, best, current, keep_scored, read_scored, scored_directory
from flows.state.snapshot import Snapshot, look_at
from flows.state.windows import read_decisions
from flows.study.compare import difference
from relex.errors import CheckpointChangedError, CheckpointDamagedError, CheckpointMismatchError, NonFiniteError
from relex.files.block_cache import BlockCache
from relex.files.location import open_directory
from relex.progress import Tell
from relex.store import Checkpoint, StoredCheckpoint, scan

logger = logging.getLogger(__name__)

# Of those that are due so many of the newest are scored; earlier ones are let be.
BUDGET = 10


def due(settings: Settings, newest: Sequence[StoredCheckpoint], seen: Mapping[str, Seen]) -> list[Checkpoint]:
    """Return the checkpoints that are to be scored, the newest first; `newest` is the run's newest segment.

    Of every `score_every` steps it is the first complete checkpoint, and of these the last BUDGET.
    """
    if settings.score_every is None:
        return []
    firsts: dict[int, Checkpoint] = {}
    for stored in newest:
        stretch = stored.step // settings.score_every
        if stored.weights is not None and stretch > 0:
            firsts.setdefault(stretch, Checkpoint(stored.step, stored.weights))
    known = {(row.step, row.seen.identity) for row in read_scored(settings)}
    latest = sorted(firsts.values(), key=lambda checkpoint: -checkpoint.step)[:BUDGET]
    return [each for each in latest if (each.step, seen[str(each.step)].identity) not in known]


@kept_children()
def catch_up(settings: Settings, *, blocks: BlockCache | None = None, tell: Tell | None = None) -> list[Scored]:
    """Score what is due, keep it, and return the scores of the newest segment; of the weights only the best's are kept.

    The store is looked at again before each: what is newest goes first. Nothing is done while another process is at it.
    Raises RelexError, EvaluationError.
    """
    if settings.score_every is None or not open_directory(settings.checkpoints).exists():
        return []
    scored_directory(settings).mkdir(parents=True, exist_ok=True)
    with held(scored_directory(settings) / "claim.lock", seconds=2.0) as mine:
        for _ in range(BUDGET if mine else 0):
            run = _look(settings, blocks)
            waiting = due(settings, run.newest, run.ever)
            if not waiting:
                break
            try:
                keep_scored(settings, _score(settings, run, waiting[0], tell))
            except CheckpointChangedError as error:
                # It may have been pruned, or written anew: the next look sees which.
                logger.warning("step %d cannot be scored: %s", waiting[0].step, error)
            _tidy(settings, run.ever)
    return current(read_scored(settings), _look(settings, blocks).ever)


def _look(settings: Settings, blocks: BlockCache | None) -> Snapshot:
    """Return what the run holds, and what is pinned of it."""
    live = look_at(settings, settings.checkpoints, blocks=blocks)
    if settings.pin == "none" or not settings.pins.exists():
        return live
    pinned = scan(settings.pins, live.base, now=live.now)
    steps = {checkpoint.step for checkpoint in pinned}
    both = (*pinned, *(checkpoint for checkpoint in live.stored if checkpoint.step not in steps))
    return replace(live, stored=tuple(sorted(both, key=lambda checkpoint: checkpoint.step)))


def _score(settings: Settings, run: Snapshot, checkpoint: Checkpoint, tell: Tell | None) -> Scored:
    def on_progress(step: Progress) -> None:
        if tell is not None:
            tell(f"{step.benchmark} @ {checkpoint.step}", step.done, step.total)

    row = Scored(checkpoint.step, run.known[str(checkpoint.step)], None)
    try:
        model = write_observed(settings, run.base, checkpoint, scored_directory(settings))
    except (CheckpointDamagedError, CheckpointMismatchError, NonFiniteError) as error:
        # Trying again would find the same.
        return replace(row, problem=str(error))
    (report,) = reports(settings, model, [settings.selection], on_progress=on_progress)
    return replace(row, score=score(model, report), against=_against(settings, checkpoint.step, report))


def _against(settings: Settings, step: int, real: Report) -> Against | None:
    """Compare with the version that was registered last; it was chosen by these problems, which speaks for it."""
    for decision in reversed(read_decisions(settings)):
        winner = decision.winner
        if decision.registered and winner is not None and decision.window < step:
            if not Path(winner.directory).is_dir():
                return None
            (ours,) = reports(settings, winner, [settings.selection])
            pair = Paired(ours.benchmark, ours.n, ours.accuracy, real.accuracy, *difference(ours, real))
            return Against(decision.registered, winner.title, step, pair)
    return None


def _tidy(settings: Settings, seen: Mapping[str, Seen]) -> None:
    kept = best(read_scored(settings), seen)
    for directory in scored_directory(settings).glob("step-*/"):
        if kept is None or directory != Path(kept.model.directory):
            shutil.rmtree(directory)
