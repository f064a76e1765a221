"""One cycle of a re-grounding: real steps by the user's trainer, a jump, and a verdict on it (see `judge`).

Each of the three phases ends in one small file that is complete or absent, and a phase whose file is there is not done
again. A cycle directory holds run-A/ (the trainer's checkpoints, A the attempt), models/, trained.json, jumped.json and
cycle.json.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from deploy.local import daemon
from evaluation.answers.harness import Progress, evaluate
from evaluation.verdict.gate import Gate
from evaluation.verdict.report import Report
from flows.errors import TrainerError
from flows.reground.settings import RegroundSettings
from flows.reground.trainer import TEMPLATES, fill, run_trainer
from flows.search.ladder import Answered, answered, find
from flows.state.decision import Model, Rung
from flows.state.records import read_json, write_json
from relex.backtest.convergence import Proposal, rungs
from relex.errors import CheckpointDamagedError, DuplicateError, NonFiniteError
from relex.extrapolation import Request, extrapolate
from relex.files.location import open_directory
from relex.layouts.steps import step_directories
from relex.predictors import parse_method
from relex.progress import Tell
from relex.store import Checkpoint, observed, open_base, scan
from relex.trajectory import open_trajectory


@dataclass(frozen=True)
class Plan:
    """What a cycle starts from: a model directory that stands for training step `start_step`, jumps included."""

    number: int
    base: str
    start_step: int


@dataclass(frozen=True)
class Trained:
    """What the trainer did: `steps` are the checkpoints it left in `checkpoints`, counted from the cycle's start."""

    checkpoints: str
    steps: tuple[int, ...]
    command: tuple[str, ...]
    seconds: float

    @property
    def real_steps(self) -> int:
        """Training steps of this cycle."""
        return self.steps[-1]


@dataclass(frozen=True)
class Jumped:
    """The models of a cycle: `observed` is the last checkpoint as it is, `jumped` what is predicted `steps` further.

    Without a jump `jumped` is empty, and `reason` says why. `ladder` are the rungs that it was chosen from, and
    `answers` what that cost.
    """

    observed: str
    jumped: str
    method: str
    steps: int
    reason: str
    warnings: tuple[str, ...]
    seconds: float
    ladder: tuple[Rung, ...] = ()
    answers: int = 0


@dataclass(frozen=True)
class Cycle:
    """A finished cycle: `model` is what the next one starts from, and `jumped_steps` 0 when that is the checkpoint.

    Accuracies are on the selection benchmark. Seconds are those of the attempt that finished each phase; a ladder is
    scored while it is climbed, in `jump_seconds`.
    """

    number: int
    base: str
    start_step: int
    real_steps: int
    jumped_steps: int
    method: str
    model: str
    reason: str
    accuracy: float
    observed_accuracy: float
    jumped_accuracy: float | None
    comparison: Gate | None
    warnings: tuple[str, ...]
    training_seconds: float
    jump_seconds: float
    scoring_seconds: float
    ladder: tuple[Rung, ...] = ()
    answers: int = 0

    @property
    def end_step(self) -> int:
        """The step its model stands for: real and jumped ones counted."""
        return self.start_step + self.real_steps + self.jumped_steps


def train(settings: RegroundSettings, plan: Plan, *, tell: Tell) -> Trained:
    """Train the cycle's real steps in a fresh directory; a run that was cut short is stopped, removed and done again.

    Raises TrainerError when the trainer fails, or leaves fewer than two checkpoints or none at the last step.
    """
    directory = settings.cycle_directory(plan.number)
    path = directory / "trained.json"
    if path.is_file():
        return read_json(path, Trained)
    name = f"cycle-{plan.number}"
    daemon.stop(settings.home, [name])
    earlier = [int(run.name.removeprefix("run-")) for run in directory.glob("run-*")]
    # A new name: should anything still write into a former one, it does not write into this.
    out = directory / f"run-{max(earlier, default=0) + 1}"
    for attempt in earlier:
        shutil.rmtree(directory / f"run-{attempt}")
    out.mkdir(parents=True)
    values = {"base": plan.base, "out": str(out), "steps": str(settings.real_steps), "cycle": str(plan.number)}
    command = fill((*settings.command, *TEMPLATES[settings.trainer]), values)

    def on_wait() -> None:
        reached = max(step_directories(open_directory(out)), default=0)
        tell(f"cycle {plan.number}: train", min(reached, settings.real_steps), settings.real_steps)

    seconds = run_trainer(settings.home, name, command, directory=settings.directory, on_wait=on_wait)
    steps = tuple(checkpoint.step for checkpoint in _checkpoints(plan, out, settings.real_steps))
    if steps[-1] != settings.real_steps:
        raise TrainerError(
            f"the trainer of {name} was told {settings.real_steps} steps and its last checkpoint in {out} is of step"
            f" {steps[-1]}. Let it save its last step: real_steps has to be a multiple of what it saves at."
        )
    trained = Trained(str(out), steps, command, seconds)
    write_json(path, asdict(trained))
    return trained


def jump(settings: RegroundSettings, plan: Plan, trained: Trained, *, tell: Tell) -> Jumped:
    """Write the last checkpoint and the jump from it as model directories; where nothing can be predicted, the first.

    The cycle's own start is the base and its steps are counted from there: W_{s+m+n} from W_s and what was observed up
    to W_{s+m} (RL-Extra, arXiv 2601.04537). The jump is cut at the total steps. Raises RelexError.
    """
    path = settings.cycle_directory(plan.number) / "jumped.json"
    if path.is_file():
        return read_json(path, Jumped)
    began = time.monotonic()
    reached = plan.start_step + trained.real_steps
    left = settings.total_steps - reached
    steps = left if settings.jump_steps == "auto" else min(settings.jump_steps, left)
    reason = "" if steps > 0 else f"Step {reached} leaves no room for a jump before step {settings.total_steps}."
    # The rungs of a ladder are written when they are reached.
    at_once = [] if reason or settings.jump_steps == "auto" else [trained.real_steps + steps]
    observed_model = _request(settings, plan, "hold", trained.real_steps)
    jumps = [_request(settings, plan, settings.method, target) for target in at_once]
    checkpoints = _checkpoints(plan, Path(trained.checkpoints), trained.real_steps)
    try:
        warnings = _write(settings, plan, checkpoints, [observed_model, *jumps], tell=tell)
    except (CheckpointDamagedError, DuplicateError, NonFiniteError) as error:
        # Two checkpoints that differ are enough for the last one as it is; when even that fails, the training did.
        reason = f"Cannot predict: {error}"
        warnings = _write(settings, plan, (checkpoints[0], checkpoints[-1]), [observed_model], tell=tell)
    jumped = Jumped(
        observed=str(observed_model.directory),
        jumped="" if reason or not jumps else str(jumps[0].directory),
        method=parse_method(settings.method).spec,
        steps=0 if reason else steps,
        reason=reason,
        warnings=warnings,
        seconds=0.0,
    )
    if not reason and not jumps:
        jumped = _climb(settings, plan, trained, jumped, checkpoints, tell=tell)
    jumped = replace(jumped, seconds=time.monotonic() - began)
    write_json(path, asdict(jumped))
    return jumped


def score(settings: RegroundSettings, model: Path, *, what: str, tell: Tell, limit: int | None = None) -> Report:
    """Return the report of a model on the selection benchmark, or its first problems; what was answered is kept."""

    def on_progress(step: Progress) -> None:
        tell(what, step.done, step.total)

    (evaluated,) = evaluate(
        model,
        [settings.selection],
        cache=settings.home / "evaluations",
        device=settings.device,
        dtype=settings.dtype,
        batch_size=settings.batch_size,
        limit=limit,
        backend=settings.backend,
        evaluations=settings.evaluations,
        on_progress=on_progress,
    )
    return evaluated.report


def _climb(
    settings: RegroundSettings,
    plan: Plan,
    trained: Trained,
    jumped: Jumped,
    checkpoints: Sequence[Checkpoint],
    *,
    tell: Tell,
) -> Jumped:
    """Return the jump that scores best on all selection problems, of a ladder up to the total steps."""
    what = f"cycle {plan.number}: score"
    targets = rungs(trained.real_steps, settings.total_steps - plan.start_step)
    observed_model = Model("observed", plan.start_step + trained.real_steps, jumped.observed)

    def write(proposals: list[Proposal]) -> list[Model]:
        requests = [_request(settings, plan, proposal.method, proposal.target_step) for proposal in proposals]
        _write(settings, plan, checkpoints, requests, tell=tell)
        return [
            Model("candidate", plan.start_step + each.target_step, str(each.directory), each.method.spec)
            for each in requests
        ]

    def answer(model: Model, limit: int | None) -> Answered:
        return answered(model, score(settings, Path(model.directory), what=what, tell=tell, limit=limit))

    problems = score(settings, Path(jumped.observed), what=what, tell=tell).n
    ladder, searched = find(
        [Proposal(jumped.method, target, None) for target in targets],
        observed_model,
        problems=problems,
        batch=settings.batch_size,
        write=write,
        answer=answer,
        measure=lambda model, count: answer(model, count if count < problems else None).score,
    )
    answers = sum(each.answers for each in (*searched.finalists, *searched.dropped))
    jumped = replace(jumped, ladder=ladder.rungs, answers=answers)
    if not searched.finalists:
        reason = f"Every jump of the ladder is worse than step {observed_model.step}."
        return replace(jumped, jumped="", steps=0, reason=reason)
    best = searched.finalists[0].model
    return replace(jumped, jumped=best.directory, steps=best.step - observed_model.step)


def _request(settings: RegroundSettings, plan: Plan, method: str, target: int) -> Request:
    """Return the prediction of a step counted from the cycle's start; its place says the step counted from the base."""
    parsed = parse_method(method)
    name = "observed" if parsed.name == "hold" else parsed.directory
    place = settings.cycle_directory(plan.number) / "models" / name / f"step-{plan.start_step + target}"
    return Request(parsed, target, place)


def tidy(settings: RegroundSettings, cycle: Cycle) -> None:
    """Remove the rungs that were not chosen, and what a cycle does not leave to the next if the settings say so."""
    directory = settings.cycle_directory(cycle.number)
    chosen = settings.keep == "chosen"
    for path in (*directory.glob("run-*"), *directory.glob("models/*/step-*")):
        fell = bool(cycle.ladder) and path.parent.parent.name == "models" and path.parent.name != "observed"
        if (chosen or fell) and str(path) != cycle.model:
            shutil.rmtree(path)


def _checkpoints(plan: Plan, out: Path, steps: int) -> tuple[Checkpoint, ...]:
    # The trainer has ended: whatever is not complete now will not be.
    return observed(scan(out, open_base(plan.base), now=math.inf), out, window=steps)


def _write(
    settings: RegroundSettings,
    plan: Plan,
    checkpoints: Sequence[Checkpoint],
    requests: Sequence[Request],
    *,
    tell: Tell,
) -> tuple[str, ...]:
    """Write the models and return what looks wrong in the cycle."""

    def telling(what: str, done: int, total: int) -> None:
        tell(f"cycle {plan.number}: {what}", done, total)

    forecasts = extrapolate(
        open_trajectory(open_base(plan.base), checkpoints),
        requests,
        grams=settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
        tell=telling,
    )
    return forecasts[0].warnings
