"""The training is stopped: the command is run and the file is written, at most once a training run.

`stop.json` in the run's state says so, before and after. What is killed in between is never done again by itself: it is
not known whether the command ran.
"""

import logging
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from deploy import runs
from deploy.errors import DeployError
from deploy.local.daemon import last_log_line
from deploy.local.own_code import for_the_user
from flows.errors import StopError
from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.lock import held
from flows.state.records import read_json, write_json
from flows.stop.plan import Order, Saving, saving

logger = logging.getLogger(__name__)

# Longer than the moment in which another one reads the record.
_LOCK_SECONDS = 2.0


@dataclass(frozen=True)
class Stop:
    """What became of stopping a training run; `began` and `ended` are UTC, in ISO 8601.

    "stopping" is a stop that is being done, or was killed while it was. `exit_status` is the command's, negative a
    signal's number; None where it has not ended or there is none. `failure` says what went wrong, in one line.
    """

    state: Literal["stopping", "stopped", "failed", "declined"]
    decision: str
    by: str
    began: str
    log: str
    file: str = ""
    ended: str = ""
    exit_status: int | None = None
    failure: str = ""
    saving: Saving | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        saved = {"steps_saved": self.saving.steps} if self.saving is not None else {}
        return asdict(self) | saved


def read_stop(settings: Settings) -> Stop | None:
    """Return what is on record about stopping this training run, None where nothing was ever tried."""
    path = record_path(settings)
    return read_json(path, Stop) if path.is_file() else None


def record_path(settings: Settings) -> Path:
    """Return the file that holds the record."""
    return settings.home / "stop.json"


def message(config: Path, stop: Stop) -> str:
    """Return what is on record in plain words, with the way out where something is to be done."""
    again = f"`relex stop {config} --confirm --again` does it again"
    if stop.state == "declined":
        return f"Stopping was declined by {stop.by} at {stop.began}: the training goes on."
    if stop.state == "stopping":
        return (
            f"It is not known whether the training was stopped: stopping began at {stop.began} by {stop.by} and did not"
            f" end. What the command said is in {stop.log}. If the training still runs, {again}."
        )
    if stop.state == "failed":
        return (
            f"The training was not stopped at {stop.ended} by {stop.by}: {stop.failure}. If it still runs, mend that,"
            f" then {again}."
        )
    counted = f" {stop.saving.sentence}" if stop.saving is not None else ""
    what = "was told to stop" if stop.file else "was stopped"
    return f"The training {what} at {stop.ended} by {stop.by}.{counted}"


def decline(settings: Settings, decision: str, *, by: str) -> Stop:
    """Record that somebody wants the training to go on; what was stopped before stays on record."""
    with _alone(settings):
        before = read_stop(settings)
        if before is not None and before.state != "declined":
            return before
        declined = Stop("declined", decision, by, _now(), log="")
        write_json(record_path(settings), declined.to_json())
        return declined


def stop_training(
    settings: Settings, decision: Decision, order: Order, *, by: str, again: Literal["refuse", "allow"] = "refuse"
) -> Stop:
    """Write the file and run the command, unless that was done or begun before, and return what is on record.

    With `again` allowed it is done whatever is on record. Whether the order may be given is the caller's to know.
    StopError while another process is at it.
    """
    with _alone(settings):
        before = read_stop(settings)
        if before is not None and before.state != "declined" and again == "refuse":
            return before
        log = settings.home / "logs" / "stop.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        stop = Stop("stopping", decision.key, by, _now(), str(log), order.file)
        write_json(record_path(settings), stop.to_json())
        failures = [_write(order, by=by)] if order.file else []
        status = None
        if order.command:
            status, failure = _run(order, log)
            failures.append(failure)
        failure = "; ".join(filter(None, failures))
        # Counted after the command: a trainer that is stopped may save once more.
        counted = None if failure else saving(settings, decision)
        state: Literal["failed", "stopped"] = "failed" if failure else "stopped"
        stop = replace(stop, state=state, ended=_now(), exit_status=status, failure=failure, saving=counted)
        write_json(record_path(settings), stop.to_json())
        return stop


def log_stop(settings: Settings, stop: Stop, *, tracking_uri: str) -> None:
    """Add to the MLflow run of the decision what became of stopping, and the steps saved; again it adds nothing.

    A server that is away is a warning: the training is stopped all the same.
    """
    saved = stop.saving
    try:
        runs.annotate(
            settings.registered_model,
            tracking_uri=tracking_uri,
            key=f"{settings.training_run} {stop.decision}",
            title=f"{settings.training_run} decision {stop.decision}",
            metrics={} if saved is None else {"steps_saved": saved.steps, "stopped_at_step": saved.latest},
            tags={"stop": stop.state, "stop_by": stop.by, "stop_at": stop.ended or stop.began},
        )
    except DeployError as error:
        logger.warning("what became of stopping %s is not in MLflow: %s", settings.training_run, error)


def _write(order: Order, *, by: str) -> str:
    try:
        write_json(Path(order.file), {**order.facts, "by": by, "written": _now()})
    except OSError as error:
        return f"stop_file {order.file} cannot be written: {error.strerror}"
    return ""


def _run(order: Order, log: Path) -> tuple[int | None, str]:
    """Run the command to its end; return its status and, unless that is 0, what went wrong."""
    with log.open("ab") as file:
        began = file.seek(0, os.SEEK_END)
        try:
            status = subprocess.run(
                order.command,
                shell=isinstance(order.command, str),
                cwd=order.directory,
                env={**for_the_user(os.environ), **order.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            ).returncode
        except OSError as error:
            return None, f"stop_command cannot be started: {error}"
    if status == 0:
        return status, ""
    last = last_log_line(log, start=began)
    return status, f"stop_command ended with status {status}: {last} (all of it in {log})"


@contextmanager
def _alone(settings: Settings) -> Iterator[None]:
    path = settings.home / "stop.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path, seconds=_LOCK_SECONDS) as mine:
        if not mine:
            raise StopError(
                f"training run {settings.training_run} is being stopped by another process (it holds {path}). Wait for"
                f" it; what its command says is in {settings.home / 'logs' / 'stop.log'}."
            )
        yield


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
