"""One cycle of a re-grounding: real steps by the user's trainer, a jump, and a verdict on it (see `judge`).

Each of the three phases ends in one small file that is complete or absent, and a phase whose file is there is not done
again. A cycle directory holds run-A/ (the trainer's checkpoints, A the attempt), models/, trained.json, jumped.json and
cycle.json.
"""

import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from deploy.local import daemon
from evaluation.verdict.gate import Gate
from flows.errors import TrainerError
from flows.reground.settings import RegroundSettings
from flows.reground.trainer import TEMPLATES, fill, run_trainer
from flows.state.records import read_json, write_json
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

    Without a jump `jumped` is empty, and `reason` says why.
    """

    observed: str
    jumped: str
    method: str
    steps: int
    reason: str
    warnings: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Cycle:
    """A finished cycle: `model` is what the next one starts from, and `jumped_steps` 0 when that is the checkpoint.

    Accuracies are on the selection benchmark. Seconds are those of the attempt that finished each phase.
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
    directory = settings.cycle_directory(plan.number)
    path = directory / "jumped.json"
    if path.is_file():
        return read_json(path, Jumped)
    began = time.monotonic()
    last = trained.real_steps
    reached = plan.start_step + last
    steps = min(settings.jump_steps, settings.total_steps - reached)
    method = parse_method(settings.method)
    place = directory / "models" / method.directory
    requests = [Request(parse_method("hold"), last, directory / "models" / "observed" / f"step-{reached}")]
    reason = f"Step {reached} leaves no room for a jump before step {settings.total_steps}."
    if steps > 0:
        requests.append(Request(method, last + steps, place / f"step-{reached + steps}"))
        reason = ""
    checkpoints = _checkpoints(plan, Path(trained.checkpoints), last)
    try:
        warnings = _write(settings, plan, checkpoints, requests, tell=tell)
    except (CheckpointDamagedError, DuplicateError, NonFiniteError) as error:
        # Two checkpoints that differ are enough for the last one as it is; when even that fails, the training did.
        del requests[1:]
        reason = f"Cannot predict: {error}"
        warnings = _write(settings, plan, (checkpoints[0], checkpoints[-1]), requests, tell=tell)
    jumped = Jumped(
        observed=str(requests[0].directory),
        jumped="" if reason else str(requests[-1].directory),
        method=method.spec,
        steps=0 if reason else steps,
        reason=reason,
        warnings=warnings,
        seconds=time.monotonic() - began,
    )
    write_json(path, asdict(jumped))
    return jumped


def tidy(settings: RegroundSettings, cycle: Cycle) -> None:
    """Remove what a finished cycle does not leave to the next, if the settings say so."""
    if settings.keep == "chosen":
        directory = settings.cycle_directory(cycle.number)
        for path in (*directory.glob("run-*"), *directory.glob("models/*/step-*")):
            if str(path) != cycle.model:
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
