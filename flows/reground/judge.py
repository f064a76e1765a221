"""Whether a jump is kept: the last checkpoint and the jump from it on the selection benchmark, problem by problem."""

import time
from dataclasses import asdict, replace
from pathlib import Path

from evaluation.verdict.gate import Gate, gate
from flows.reground.cycle import Cycle, Jumped, Plan, Trained, score
from flows.reground.settings import RegroundSettings
from flows.state.records import read_json, write_json
from relex.progress import Tell


def judge(settings: RegroundSettings, plan: Plan, trained: Trained, jumped: Jumped, *, tell: Tell) -> Cycle:
    """Score the last checkpoint and the jump on the selection benchmark and say which one the next cycle starts from.

    A jump is kept unless its mean score is below the checkpoint's by more than the margin. To ask for proof that it is
    no worse would refuse most jumps that are not, on the few hundred problems one scores every cycle; the next real
    steps correct a small loss. The paired bound is recorded.
    """
    path = settings.cycle_directory(plan.number) / "cycle.json"
    if path.is_file():
        return read_json(path, Cycle)
    began = time.monotonic()
    reached = plan.start_step + trained.real_steps
    what = f"cycle {plan.number}: score"
    before = score(settings, Path(jumped.observed), what=what, tell=tell)
    after, comparison, reason = None, None, jumped.reason
    if jumped.jumped:
        after = score(settings, Path(jumped.jumped), what=f"{what} jump", tell=tell)
        comparison = replace(
            gate(after, before, margin=settings.margin),
            candidate=f"jumped @ {reached + jumped.steps}",
            reference=f"trained @ {reached}",
        )
        reason = _reason(comparison)
    kept = comparison is not None and not hurts(comparison)
    cycle = Cycle(
        number=plan.number,
        base=plan.base,
        start_step=plan.start_step,
        real_steps=trained.real_steps,
        jumped_steps=jumped.steps if kept else 0,
        method=jumped.method,
        model=jumped.jumped if kept else jumped.observed,
        reason=reason,
        accuracy=after.accuracy if kept and after is not None else before.accuracy,
        observed_accuracy=before.accuracy,
        jumped_accuracy=None if after is None else after.accuracy,
        comparison=comparison,
        warnings=jumped.warnings,
        training_seconds=trained.seconds,
        jump_seconds=jumped.seconds,
        scoring_seconds=time.monotonic() - began,
        ladder=jumped.ladder,
        answers=jumped.answers,
    )
    write_json(path, asdict(cycle))
    return cycle


def hurts(comparison: Gate) -> bool:
    """Whether the jump scores below the checkpoint it started from by more than the margin."""
    return comparison.difference < -comparison.margin


def _reason(comparison: Gate) -> str:
    verdict = "hurts: the next steps start from the checkpoint" if hurts(comparison) else "is kept"
    return (
        f"The jump {verdict}. On {comparison.n} problems of {comparison.benchmark}, {comparison.candidate} scores"
        f" {comparison.candidate_accuracy:.4f} and {comparison.reference} {comparison.reference_accuracy:.4f}: the"
        f" difference is {comparison.difference:+.4f}, with {comparison.confidence:.4g} confidence at least"
        f" {comparison.lower_bound:+.4f} ({comparison.method})."
    )
