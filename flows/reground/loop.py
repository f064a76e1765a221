"""Periodic re-grounding: cycles of real steps and jumps until a step or an accuracy is reached, and what came of it.

Training goes on from every kept jump, so the next one is predicted from weights that are real again (RL-Extra, arXiv
2601.04537).
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from evaluation.child import kept_children
from flows.errors import AtWorkError, RegroundError
from flows.reground.cycle import Cycle, Jumped, Plan, Trained, jump, score, tidy, train
from flows.reground.judge import judge
from flows.reground.settings import Reference, RegroundSettings
from flows.state.lock import held
from flows.state.records import read_json, write_json
from relex.output.download import local_model
from relex.progress import Tell


@dataclass(frozen=True)
class Start:
    """What the first cycle starts from: a model, by its content, and how it does on the selection benchmark."""

    base: str
    digest: str
    benchmark: str
    benchmark_digest: str
    accuracy: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class Phases:
    """The three phases of a cycle, as they are or wrapped."""

    train: Callable[..., Trained] = train
    jump: Callable[..., Jumped] = jump
    judge: Callable[..., Cycle] = judge


@dataclass(frozen=True)
class Regrounding:
    """What the cycles came to. `ended` says why there are no more, and is empty while there will be."""

    training_run: str
    start: Start
    cycles: tuple[Cycle, ...]
    target_accuracy: float | None
    reference: Reference | None
    ended: str

    @property
    def model(self) -> str:
        """The directory of the last model."""
        return self.cycles[-1].model if self.cycles else self.start.base

    @property
    def accuracy(self) -> float:
        """Its accuracy on the selection benchmark."""
        return self.cycles[-1].accuracy if self.cycles else self.start.accuracy

    @property
    def step(self) -> int:
        """The step it stands for: real and jumped ones counted."""
        return self.cycles[-1].end_step if self.cycles else 0

    @property
    def real_steps(self) -> int:
        """Steps that were trained."""
        return sum(cycle.real_steps for cycle in self.cycles)

    @property
    def training_seconds(self) -> float:
        """Seconds the trainer ran, its start of every cycle included."""
        return sum(cycle.training_seconds for cycle in self.cycles)

    @property
    def other_seconds(self) -> float:
        """Seconds of predicting and scoring."""
        return sum(cycle.jump_seconds + cycle.scoring_seconds for cycle in self.cycles)

    @property
    def reached(self) -> bool:
        """Whether the target accuracy, if there is one, is reached."""
        return self.target_accuracy is not None and self.accuracy >= self.target_accuracy

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; what was saved is there when there is a reference and its accuracy was reached."""
        names = ("model", "accuracy", "step", "real_steps", "training_seconds", "other_seconds", "reached")
        content: dict[str, Any] = {name: getattr(self, name) for name in names}
        content["jumped_steps"] = self.step - self.real_steps
        if self.reference is not None and self.reached:
            content["saved_steps"] = self.reference.steps - self.real_steps
            if self.reference.seconds is not None:
                content["saved_seconds"] = self.reference.seconds - self.training_seconds
        reference = None if self.reference is None else self.reference.model_dump()
        return content | asdict(self) | {"reference": reference}


def reground(
    settings: RegroundSettings,
    *,
    tell: Tell,
    phases: Phases | None = None,
    on_cycle: Callable[[Regrounding], None] | None = None,
) -> Regrounding:
    """Run cycles until one ends at the total steps or the target accuracy; a call after a kill goes on where it was.

    `on_cycle` gets the state after each. Raises RegroundError when another process is at work on it or the base or the
    benchmark is not what it was begun with, TrainerError, RelexError and EvaluationError.
    """
    phases = phases or Phases()
    settings.home.mkdir(parents=True, exist_ok=True)
    with held(settings.home / "lock", seconds=2.0) as mine:
        if not mine:
            raise AtWorkError(f"another process is at work in {settings.home}. Wait for it, or stop it.")
        start = _start(settings, tell)
        cycles: list[Cycle] = []
        regrounding = _summary(settings, start, cycles)
        while True:
            write_json(settings.home / "reground.json", regrounding.to_json())
            if regrounding.ended:
                return regrounding
            plan = Plan(len(cycles) + 1, regrounding.model, regrounding.step)
            trained = phases.train(settings, plan, tell=tell)
            # Not while the trainer runs, which may need all memory.
            with kept_children():
                jumped = phases.jump(settings, plan, trained, tell=tell)
                cycles.append(phases.judge(settings, plan, trained, jumped, tell=tell))
            tidy(settings, cycles[-1])
            regrounding = _summary(settings, start, cycles)
            if on_cycle is not None:
                on_cycle(regrounding)


def _summary(settings: RegroundSettings, start: Start, cycles: Sequence[Cycle]) -> Regrounding:
    regrounding = Regrounding(
        settings.training_run, start, tuple(cycles), settings.target_accuracy, settings.reference, ended=""
    )
    ended = ""
    if regrounding.reached:
        target = f"the target {settings.target_accuracy} or above"
        ended = f"accuracy {regrounding.accuracy:.4f} on {start.benchmark} is {target}"
    elif regrounding.step >= settings.total_steps:
        ended = f"step {regrounding.step} is the total {settings.total_steps} or above"
    return replace(regrounding, ended=ended)


def _start(settings: RegroundSettings, tell: Tell) -> Start:
    base = local_model(settings.base, settings.home / "base")
    report = score(settings, base, what="score base", tell=tell)
    start = Start(
        str(base),
        report.model_digest,
        report.benchmark,
        report.benchmark_digest,
        report.accuracy,
        report.standard_error,
        report.n,
    )
    path = settings.home / "start.json"
    if path.is_file():
        begun = read_json(path, Start)
        for what, ours, theirs in (
            (f"base {settings.base}", start.digest, begun.digest),
            (f"benchmark {settings.selection}", start.benchmark_digest, begun.benchmark_digest),
        ):
            if ours != theirs:
                raise RegroundError(
                    f"{settings.home} was begun with sha256 {theirs[:12]}… of its {what.split()[0]}, and {what} has"
                    f" {ours[:12]}…. Give what it was begun with, or another training_run."
                )
    else:
        write_json(path, asdict(start))
    return start
