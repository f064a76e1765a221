"""What stopping a training run would do, what it would save, and what stands against it.

A stop is due when the decision registered a winner and the backtest trusts its target step. Beyond trust somebody may
still stop, who says so; on anything else nobody may.
"""

import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.errors import StopError
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.ledger import known, read_ledger, segment
from flows.state.windows import key_of, read_decisions
from relex.errors import RelexError
from relex.store import State, open_base, scan


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
    def deeds(self) -> str:
        """Return what is done, as the end of a sentence."""
        words = self.command if isinstance(self.command, str) else shlex.join(self.command)
        deeds = [f"run `{words}` in {self.directory}"] if words else []
        return " and ".join([f"write {self.file}", *deeds] if self.file else deeds)

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


def doubt(config: Path, settings: Settings, decision: Decision) -> str:
    """Return why only somebody who says so may stop the training on a registered winner, or nothing.

    A winner that is better than what was observed may still be far from what the run would reach: it has to stand for
    the planned end.
    """
    winner, trusted, end = decision.winner, decision.trusted_step, settings.total_steps
    if winner is None:
        return ""
    if trusted is None or winner.step > trusted:
        trust = "no target" if trusted is None else f"no target beyond step {trusted}"
        why = f"The backtest trusts {trust} and the winner predicts {winner.step}"
    elif end is not None and winner.step < end:
        why = f"The winner predicts step {winner.step} of {end} planned, and nothing says what the others would bring"
    else:
        return ""
    return f"{why}: the training goes on. `relex stop {config} --confirm --beyond-trust` stops it all the same."


def finished(saving: Saving) -> str:
    """Return that the run has written all its planned steps, or nothing."""
    if saving.of == "predicted" or saving.steps > 0:
        return ""
    return f"The run has written step {saving.latest} of {saving.end} planned: nothing is left to stop."


def saving(settings: Settings, decision: Decision) -> Saving:
    """Return what stopping now saves: counted from the latest step that the newest segment of the run has whole.

    While the store cannot be read, from the latest step known before.
    """
    ledger = read_ledger(settings)
    now = time.time()
    try:
        stored = scan(settings.checkpoints, open_base(settings.base), now=now)
        newest = segment(stored, known(stored, ledger, now=now))
        written = [item.step for item in newest if item.state is State.READY]
    except RelexError:
        written = [int(step) for step in ledger.checkpoints]
    latest = max(written, default=decision.steps[-1])
    if settings.total_steps is not None:
        return Saving(latest, settings.total_steps, "planned")
    assert decision.winner is not None  # whoever asks has an order
    return Saving(latest, decision.winner.step, "predicted")


def current_decision(settings: Settings) -> tuple[Decision | None, str]:
    """Return the newest decision that registered a winner, else the newest one, or why there is none.

    Only decisions on the checkpoints and settings as they are now: a run that was started anew has not been decided.
    """
    decisions = read_decisions(settings)
    current = [item for item in decisions if is_current(settings, item)]
    registered = [item for item in current if not refusal(item)]
    if current:
        return (registered or current)[-1], ""
    if decisions:
        counted = "1 decision was" if len(decisions) == 1 else f"{len(decisions)} decisions were"
        return (
            None,
            f"{counted} made about {settings.training_run}, on other checkpoints or settings than there are now.",
        )
    return None, f"Nothing is decided about {settings.training_run} yet."


def is_current(settings: Settings, decision: Decision) -> bool:
    """Whether the decision is on the checkpoints, as the watcher knows them, and on the settings as they are now."""
    base = open_base(settings.base)
    ledger = read_ledger(settings)
    checkpoints = ledger.released | ledger.checkpoints
    if not checkpoints:
        now = time.time()
        checkpoints = known(scan(settings.store, base, now=now), ledger, now=now)
    inside = {step: checkpoints[str(step)].identity for step in decision.steps if str(step) in checkpoints}
    return key_of(settings, base, inside) == decision.key
