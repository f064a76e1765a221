"""Flow runs that failed, kept for whoever is to be told: a small file each, the same failure once."""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State

from flows.errors import ConfigError, WindowError
from flows.settings import Settings, load_settings
from flows.state.records import read_json, write_json
from relex.errors import OutputError

# How Prefect begins what it says of an exception.
_RAISED = "Flow run encountered an exception: "


@dataclass(frozen=True)
class Failure:
    """A flow run by its name, the error that ended it, and when (seconds since the epoch)."""

    run: str
    error: str
    at: float

    @property
    def key(self) -> str:
        """What is the same failure: it is tried again, and numbers in the message may differ."""
        return sha256(f"{self.run} {self.error.partition(':')[0]}".encode()).hexdigest()[:16]


def keep_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State[Any]) -> None:  # noqa: ARG001
    """Keep that a flow run on the `config` among its parameters failed; Prefect calls it (`on_failure`).

    A window that is another one by now is no failure: that one is announced.
    """
    failure = Failure(flow_run.name, (state.message or "").removeprefix(_RAISED), time.time())
    if failure.error.startswith(f"{WindowError.__name__}:"):
        return
    # A config that is gone is said by the run's own line; without room on the disk there is no place for this.
    with suppress(ConfigError, OutputError):
        settings = load_settings(Path(str(flow_run.parameters.get("config", ""))))
        write_json(settings.home / "failures" / f"{failure.key}.json", asdict(failure))


def read_failures(settings: Settings) -> list[Failure]:
    """Return what failed so far, oldest first."""
    failures = [read_json(path, Failure) for path in settings.home.glob("failures/*.json")]
    return sorted(failures, key=lambda failure: failure.at)
