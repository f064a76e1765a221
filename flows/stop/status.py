"""How stopping a training run stands: what would be done and saved, or what stands against it; and doing it by hand.

A stop is due when the decision registered a winner and training on may win no more than `stop_price` (see outlook).
Beyond that price somebody may still stop, who says so; on anything else nobody may.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.errors import StopError
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.ledger import read_ledger
from flows.state.snapshot import look_at
from flows.state.windows import key_of, read_decisions
from flows.stop.execute import Stop, message, read_stop, stop_training
from flows.stop.outlook import outlook, room, sentence, voted
from flows.stop.plan import Order, Saving, order, refusal, saving
from relex.store import open_base


@dataclass(frozen=True)
class Status:
    """What there is to say before a training run is stopped.

    `refusal` is why nobody may stop it, `unmet` why only somebody who says so may, both empty where there is no reason;
    `record` is what was done before. Without a refusal there are a decision, an order and a saving.
    """

    config: Path
    refusal: str
    unmet: str = ""
    decision: Decision | None = None
    order: Order | None = None
    saving: Saving | None = None
    record: Stop | None = None
    outlook: str = ""

    @property
    def sentence(self) -> str:
        """Return how it stands, and what to do next."""
        parts = [message(self.config, self.record)] if self.record is not None else []
        if self.record is not None and self.record.state != "declined":
            return parts[0]
        if self.refusal or self.order is None or self.saving is None:
            return " ".join([*parts, self.refusal])
        way = f"`relex stop {self.config} --confirm` does it, once: {self.order.actions}."
        return " ".join(filter(None, [*parts, self.unmet or way, self.saving.sentence, self.outlook]))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "sentence": self.sentence,
            "refusal": self.refusal,
            # As scripts that read it know it.
            "doubt": self.unmet,
            "outlook": self.outlook,
            "order": self.order.to_json() if self.order is not None else None,
            "steps_saved": self.saving.steps if self.saving is not None else None,
            "steps_saved_of": self.saving.of if self.saving is not None else None,
            "latest_step": self.saving.latest if self.saving is not None else None,
            "record": self.record.to_json() if self.record is not None else None,
        }


def look(config: Path, settings: Settings) -> Status:
    """Return how stopping the training run stands now, on the newest decision that registered a winner."""
    record = read_stop(settings)
    decision, reason = current_decision(settings)
    if decision is None:
        return Status(config, reason, record=record)
    try:
        due = order(config, settings, decision)
    except StopError as error:
        return Status(config, str(error), decision=decision, record=record)
    counted = saving(settings, decision)
    in_the_way, outlook_sentence = unmet(config, settings, decision), sentence(outlook(settings, decision))
    return Status(config, finished(counted), in_the_way, decision, due, counted, record, outlook_sentence)


def confirm(
    settings: Settings,
    status: Status,
    *,
    by: str,
    beyond_price: Literal["refuse", "allow"] = "refuse",
    again: Literal["refuse", "allow"] = "refuse",
) -> Stop:
    """Stop the training, which was looked at, and return what is on record; it may have been stopped before.

    StopError with what stands against it, and the way out.
    """
    before = status.record if again == "refuse" else None
    if before is not None and before.state == "stopped":
        return before
    if before is not None and before.state != "declined":
        raise StopError(message(status.config, before))
    if status.refusal or status.decision is None or status.order is None:
        raise StopError(status.refusal)
    if status.unmet and beyond_price == "refuse":
        raise StopError(status.unmet)
    done = stop_training(settings, status.decision, status.order, by=by, again=again)
    if done.state != "stopped":
        raise StopError(message(status.config, done))
    return done


def unmet(config: Path, settings: Settings, decision: Decision) -> str:
    """Return why only somebody who says so may stop the training on a registered winner, or nothing.

    A winner that is better than what was observed may still be far from what the run would reach. Nothing in the
    observed steps tells how far, except near the ceiling; else a record of finished runs may speak for a rule.
    """
    left = room(settings, decision)
    if left is not None and left.points <= settings.stop_price:
        return ""
    if voted(settings, decision):
        return ""
    if left is None:
        why = "An earlier version decided, and did not keep what the winner has at least"
    else:
        why = f"{left.sentence}: more than stop_price, {settings.stop_price:g}"
    return f"{why}. The training goes on; `relex stop {config} --confirm --beyond-price` stops it all the same."


def finished(saving: Saving) -> str:
    """Return that the run has written all its planned steps, or nothing."""
    if saving.of == "predicted" or saving.steps > 0:
        return ""
    return f"The run has written step {saving.latest} of {saving.end} planned: nothing is left to stop."


def current_decision(settings: Settings) -> tuple[Decision | None, str]:
    """Return the newest decision that registered a winner, else the newest one, or why there is none.

    Only decisions on the checkpoints and settings as they are now: a run that was started anew has not been decided.
    """
    decisions = read_decisions(settings)
    current = [decision for decision in decisions if is_current(settings, decision)]
    registered = [decision for decision in current if not refusal(decision)]
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
        checkpoints = dict(look_at(settings, settings.store).known)
    inside = {step: checkpoints[str(step)].identity for step in decision.steps if str(step) in checkpoints}
    return key_of(settings, base, inside) == decision.key
