"""The events that relex sends: their names, what is in them, and how often one is sent again."""

from dataclasses import dataclass
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from flows.settings import Settings

CHECKPOINT_READY = "relex.checkpoint.ready"
WINDOW_READY = "relex.window.ready"
TARGET_REACHED = "relex.target.reached"
PREDICTION_DRIFTED = "relex.prediction.drifted"

_RESEND_SECONDS = 30.0
_RESEND_SECONDS_AT_MOST = 300.0


@dataclass(frozen=True)
class Event:
    """One event to send; the id is the same whenever the same thing is announced."""

    name: str
    id: UUID
    resource: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Sent:
    """How often something was announced, and when last (seconds since the epoch)."""

    times: int
    last: float

    def due(self, now: float) -> bool:
        """Whether it is announced again at time `now`: the pauses grow."""
        wait = min(_RESEND_SECONDS * 2 ** max(self.times - 1, 0), _RESEND_SECONDS_AT_MOST)
        return self.times == 0 or now - self.last >= wait


def resource(settings: Settings) -> str:
    """Return the Prefect resource of a training run."""
    return f"relex.training-run.{settings.training_run}"


def event(name: str, settings: Settings, what: str, payload: dict[str, Any]) -> Event:
    """Return the event that tells `what`; its id is the same whenever that is told."""
    where = resource(settings)
    return Event(name, uuid5(NAMESPACE_URL, f"{where} {settings.home} {name} {what}"), where, payload)
