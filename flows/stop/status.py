"""How stopping a training run stands: what would be done and saved, or what stands against it; and doing it by hand."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from flows.errors import StopError
from flows.settings import Settings
from flows.state.decision import Decision
from flows.stop.execute import Stop, read_stop, stop_training, told
from flows.stop.plan import Order, Saving, current_decision, doubt, finished, order, saving


@dataclass(frozen=True)
class Outlook:
    """What there is to say before a training run is stopped.

    `refusal` is why nobody may stop it, `doubt` why only somebody who says so may, both empty where there is no reason;
    `record` is what was done before. Without a refusal there are a decision, an order and a saving.
    """

    config: Path
    refusal: str
    doubt: str = ""
    decision: Decision | None = None
    order: Order | None = None
    saving: Saving | None = None
    record: Stop | None = None

    @property
    def sentence(self) -> str:
        """Return how it stands, and what to do next."""
        parts = [told(self.config, self.record)] if self.record is not None else []
        if self.record is not None and self.record.state != "declined":
            return parts[0]
        if self.refusal or self.order is None or self.saving is None:
            return " ".join([*parts, self.refusal])
        way = f"`relex stop {self.config} --confirm` does it, once: {self.order.deeds}."
        return " ".join([*parts, self.doubt or way, self.saving.sentence])

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {
            "sentence": self.sentence,
            "refusal": self.refusal,
            "doubt": self.doubt,
            "order": self.order.to_json() if self.order is not None else None,
            "steps_saved": self.saving.steps if self.saving is not None else None,
            "steps_saved_of": self.saving.of if self.saving is not None else None,
            "latest_step": self.saving.latest if self.saving is not None else None,
            "record": self.record.to_json() if self.record is not None else None,
        }


def outlook(config: Path, settings: Settings) -> Outlook:
    """Return how stopping the training run stands now, on the newest decision that registered a winner."""
    record = read_stop(settings)
    decision, reason = current_decision(settings)
    if decision is None:
        return Outlook(config, reason, record=record)
    try:
        due = order(config, settings, decision)
    except StopError as error:
        return Outlook(config, str(error), decision=decision, record=record)
    counted = saving(settings, decision)
    return Outlook(config, finished(counted), doubt(config, settings, decision), decision, due, counted, record)


def confirm(
    settings: Settings,
    found: Outlook,
    *,
    by: str,
    beyond_trust: Literal["refuse", "allow"] = "refuse",
    again: Literal["refuse", "allow"] = "refuse",
) -> Stop:
    """Stop the training, which was looked at, and return what is on record; it may have been stopped before.

    StopError with what stands against it, and the way out.
    """
    before = found.record if again == "refuse" else None
    if before is not None and before.state == "stopped":
        return before
    if before is not None and before.state != "declined":
        raise StopError(told(found.config, before))
    if found.refusal or found.decision is None or found.order is None:
        raise StopError(found.refusal)
    if found.doubt and beyond_trust == "refuse":
        raise StopError(found.doubt)
    done = stop_training(settings, found.decision, found.order, by=by, again=again)
    if done.state != "stopped":
        raise StopError(told(found.config, done))
    return done
