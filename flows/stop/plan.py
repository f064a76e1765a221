"""What stopping a training run on a decision would do, and what it would save."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.errors import StopError
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.ledger import read_ledger
from flows.state.snapshot import look_at
from relex.errors import RelexError
from relex.store import State


@dataclass(frozen=True)
class Saving:
    """Training steps that are not trained: of those `planned`, or up to the `predicted` step where no plan is known.

    `latest` is the last step the run has written whole, `end` the planned or predicted one; `steps` is never negative.
    """

    latest: int
    end: int
    of: Literal["planned", "predicted"]

    @property
    def steps(self) -> int:
        """How many are saved."""
        return max(self.end - self.latest, 0)

    @property
    def sentence(self) -> str:
        """Return the number and what it is counted to."""
        if self.of == "planned":
            return f"The run has written step {self.latest} of {self.end} planned: {self.steps} steps are saved."
        if self.steps == 0:
            return (
                f"The run has written step {self.latest}, the prediction stands for step {self.end}, and total_steps is"
                " not given: no saved steps are known."
            )
        return (
            f"The run has written step {self.latest}: {self.steps} steps are saved up to the predicted step {self.end}"
            " (total_steps is not given)."
        )


@dataclass(frozen=True)
class Order:
    """What is run and written once, in `directory`, that of relex.yaml, and the registered model that it is for."""

    training_run: str
    key: str
    window: int
    model: str
    target_step: int
    registered: str
    command: str | tuple[str, ...]
    file: str
    directory: str

    @property
    def facts(self) -> Mapping[str, str | int]:
        """Return what the stop file says."""
        return {
            "training_run": self.training_run,
            "decision": self.key,
            "window": self.window,
            "target_step": self.target_step,
            "model": self.model,
            "registered": self.registered,
        }

    @property
    def environment(self) -> Mapping[str, str]:
        """Return the variables that the command finds set."""
        names = ("training_run", "window", "target_step", "model", "registered")
        return {f"RELEX_{name.upper()}": str(self.facts[name]) for name in names}

    @property
    def actions(self) -> str:
        """Return what is done, as the end of a sentence."""
        words = self.command if isinstance(self.command, str) else shlex.join(self.command)
        commands = [f"run `{words}` in {self.directory}"] if words else []
        return " and ".join([f"write {self.file}", *commands] if self.file else commands)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        command = self.command if isinstance(self.command, str) else list(self.command)
        return {**self.facts, "command": command, "file": self.file, "directory": self.directory}


def order(config: Path, settings: Settings, decision: Decision) -> Order:
    """Return what stopping on this decision does; StopError where nothing was registered or nothing is configured."""
    winner = decision.winner
    if decision.verdict != "registered" or winner is None:
        raise StopError(refusal(decision))
    if not configured(settings):
        raise StopError(f"{config} has neither stop_command nor stop_file: add one, and the training can be stopped.")
    command = settings.stop_command or ""
    return Order(
        training_run=settings.training_run,
        key=decision.key,
        window=decision.window,
        model=winner.directory,
        target_step=winner.step,
        registered=decision.registered,
        command=command if isinstance(command, str) else tuple(command),
        file=str(settings.stop_file or ""),
        directory=str(config.absolute().parent),
    )


def configured(settings: Settings) -> bool:
    """Whether relex.yaml says how the training is stopped."""
    return settings.stop_command is not None or settings.stop_file is not None


def refusal(decision: Decision) -> str:
    """Return why nobody may stop the training on this decision, or nothing."""
    if decision.verdict == "registered" and decision.winner is not None:
        return ""
    return f"The training is needed: on window {decision.window} nothing was registered. {decision.reason}"


def saving(settings: Settings, decision: Decision) -> Saving:
    """Return what stopping now saves: counted from the latest step that the newest segment of the run has whole.

    While the store cannot be read, from the latest step known before.
    """
    try:
        newest = look_at(settings, settings.checkpoints).newest
        written = [checkpoint.step for checkpoint in newest if checkpoint.state is State.READY]
    except RelexError:
        written = [int(step) for step in read_ledger(settings).checkpoints]
    latest = max(written, default=decision.steps[-1])
    if settings.total_steps is not None:
        return Saving(latest, settings.total_steps, "planned")
    assert decision.winner is not None  # whoever asks has an order
    return Saving(latest, decision.winner.step, "predicted")
