"""Which old predictions can be compared with what the run has reached, and why others cannot (yet)."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.drift.finish import unfinished
from flows.drift.record import Compared, read_one
from flows.settings import Settings
from flows.state.decision import Decision, Model
from flows.state.ledger import Seen, left_behind
from flows.state.snapshot import look_at
from flows.state.windows import read_decisions
from relex.files.block_cache import BlockCache
from relex.files.location import open_directory
from relex.layouts.weights import Weights
from relex.output.manifest import FILE_NAME
from relex.store import Checkpoint, State, StoredCheckpoint

# Where a run does not save its target, the next checkpoint stands for it when it is this share of the jump beyond.
_BEYOND = 0.05


@dataclass(frozen=True)
class Reached:
    """A prediction that can be compared: what there is to say of it before, its models, and the real checkpoint."""

    before: Compared
    predicted: Model
    observed: Model
    real: Checkpoint
    benchmarks: tuple[str, ...]


@dataclass(frozen=True)
class Waiting:
    """A prediction that cannot be compared, and why not (yet)."""

    method: str
    target: int
    observed: int
    reason: str


def reached(settings: Settings, stored: Sequence[StoredCheckpoint], seen: Mapping[str, Seen]) -> list[Reached]:
    """Return every prediction whose step the run has reached and that was not compared so far as is asked for.

    `stored` are the checkpoints the store has, `seen` what is known of them and of those that were there before. A step
    stands for a target when it is of the same segment of the run as the window, and the target itself or the first
    one saved after it, at most 5 % of the jump beyond.
    """
    return [prediction for prediction in _status(settings, stored, seen) if isinstance(prediction, Reached)]


def planned_end(settings: Settings, stored: Sequence[StoredCheckpoint], seen: Mapping[str, Seen]) -> Checkpoint | None:
    """Return the real checkpoint of the planned end while there is a winner to compare with it, see `unfinished`."""
    open_decisions = unfinished(settings)
    if not open_decisions or settings.total_steps is None:
        return None
    behind = left_behind(stored, seen)
    newest = [checkpoint for checkpoint in stored if checkpoint.step not in behind]
    for decision in open_decisions:
        there = _stands_for(newest, settings.total_steps, decision.window)
        if isinstance(there, Checkpoint) and _is_continued(decision, decision.window, seen, behind):
            return there
    return None


def look(
    settings: Settings, *, blocks: BlockCache | None = None
) -> tuple[Weights, list[Reached], list[Waiting]] | None:
    """Look at the store now: the base, what can be compared, and what cannot; None when nothing is there any more."""
    run = open_directory(settings.checkpoints, blocks=blocks)
    if settings.drift == "off" or not run.exists():
        return None
    now = look_at(settings, run, blocks=blocks)
    predictions = list(_status(settings, now.stored, now.ever))
    due = [prediction for prediction in predictions if isinstance(prediction, Reached)]
    return now.base, due, [prediction for prediction in predictions if isinstance(prediction, Waiting)]


def _status(
    settings: Settings, stored: Sequence[StoredCheckpoint], seen: Mapping[str, Seen]
) -> Iterator[Reached | Waiting]:
    if settings.drift == "off":
        return
    behind = left_behind(stored, seen)
    newest = [checkpoint for checkpoint in stored if checkpoint.step not in behind]
    for decision in read_decisions(settings):
        models = _models(decision)
        observed = next((model for model in models if model.role == "observed"), None)
        if observed is None:
            continue
        same = _is_continued(decision, observed.step, seen, behind)
        for model in models:
            if model.role != "candidate":
                continue
            kept = read_one(settings, decision.key, model.method, model.step)
            if kept is not None and (kept.asked == "accuracy" or settings.drift == "weights"):
                continue
            there = _stands_for(newest, model.step, observed.step)
            if not same:
                there = f"the run was resumed, or started anew, before step {observed.step}"
            elif not all((Path(needed.directory) / FILE_NAME).is_file() for needed in (model, observed)):
                there = "the model, or the copy of the last observed checkpoint, was deleted"
            elif kept is not None and isinstance(there, Checkpoint) and there.step != kept.step:
                there = f"its weights were compared with step {kept.step}, which is gone"
            if isinstance(there, str):
                yield Waiting(model.method, model.step, observed.step, there)
                continue
            if kept is None:
                registered = decision.registered if model == decision.winner else ""
                kept = Compared(
                    decision.key,
                    observed.step,
                    model.method,
                    model.step,
                    there.step,
                    model.skill_at_least,
                    registered,
                    "weights",
                    None,
                )
            yield Reached(kept, model, observed, there, _benchmarks(settings, decision, model))


def _models(decision: Decision) -> list[Model]:
    # What fell off a ladder is gone, and nobody asks how far it was.
    scores = decision.selection if decision.ladder else (*decision.selection, *decision.dropped)
    return list(dict.fromkeys(score.model for score in scores))


def _is_continued(decision: Decision, last: int, seen: Mapping[str, Seen], behind: set[int]) -> bool:
    """Whether all that is known of the run up to step `last` is what was observed."""
    written = dict(zip(decision.steps, decision.written or (None,) * len(decision.steps), strict=True))
    inside = {
        int(step): checkpoint.written
        for step, checkpoint in seen.items()
        if int(step) <= last and int(step) not in behind
    }
    return all(step in written and written[step] in (None, time) for step, time in inside.items())


def _stands_for(newest: Sequence[StoredCheckpoint], target: int, last: int) -> Checkpoint | str:
    """Return the checkpoint that stands for a target, or why there is none."""
    limit = target + _BEYOND * (target - last)
    for checkpoint in newest:
        if target <= checkpoint.step <= limit and checkpoint.weights is not None:
            return Checkpoint(checkpoint.step, checkpoint.weights)
        if target <= checkpoint.step <= limit and checkpoint.state is State.NOT_YET:
            return f"step {checkpoint.step} is not complete yet"
    latest = max((checkpoint.step for checkpoint in newest), default=0)
    if latest < limit:
        return f"the run is at step {latest}"
    return f"the store has no checkpoint at steps {target} to {int(limit)}, and the run is at step {latest}"


def _benchmarks(settings: Settings, decision: Decision, model: Model) -> tuple[str, ...]:
    """Return the benchmarks that the prediction was scored on when it was decided, but for the one that chose it."""
    benchmarks = [settings.gate] if model == decision.winner else []
    if any(score.model == model for score in decision.report):
        benchmarks += settings.report
    return tuple(benchmarks)
