"""The user's trainer, as a process of its own: how it is told what to train, started, followed and stopped.

It always begins a new run in a new output directory; nothing here writes what a trainer resumes from.
"""

import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import psutil

from deploy.local import daemon
from deploy.local.own_code import for_the_user
from flows.errors import TrainerError

_POLL_SECONDS = 0.3

PLACEHOLDERS = ("base", "out", "steps", "cycle")

Trainer = Literal["own", "trl", "verl"]

# The options by which a trainer is given weights to start from, the number of steps and a place of its own.
TEMPLATES: Mapping[Trainer, tuple[str, ...]] = {
    "own": (),
    "trl": ("--model_name_or_path", "{base}", "--max_steps", "{steps}", "--output_dir", "{out}"),
    "verl": (
        "actor_rollout_ref.model.path={base}",
        "trainer.total_training_steps={steps}",
        "trainer.default_local_dir={out}",
        "trainer.resume_mode=disable",
    ),
}


def fill(words: Sequence[str], values: Mapping[str, str]) -> tuple[str, ...]:
    """Return the words with every {name} of PLACEHOLDERS replaced; other braces are the trainer's own."""
    pattern = re.compile(rf"\{{({'|'.join(PLACEHOLDERS)})\}}")
    return tuple(pattern.sub(lambda match: values[match[1]], word) for word in words)


def run_trainer(home: Path, name: str, argv: Sequence[str], *, directory: Path, on_wait: Callable[[], None]) -> float:
    """Run a trainer in `directory` to its end and return how many seconds it took.

    It has a session of its own, which is ended when this call is left in any way; what a killed call of the same `home`
    and `name` left running is ended first. `on_wait` is called now and then. Raises TrainerError with the last line of
    the log when its status is not 0.
    """
    # The shell only changes the directory: the trainer takes its place and its pid.
    shell = ["/bin/sh", "-c", 'cd "$0" && exec "$@"', str(directory), *argv]
    began = time.monotonic()
    started = daemon.start(home, name, shell, environment=for_the_user(os.environ))
    try:
        status = _follow(psutil.Process(started.pid), on_wait)
    finally:
        daemon.stop(home, [name])
    if status != 0:
        raise TrainerError(
            f"the trainer of {name} ended with status {status}: {daemon.last_log_line(started.log)}"
            f" (all of it in {started.log})."
            " Mend the command or what it needs and start again; finished cycles are kept."
        )
    return time.monotonic() - began


def _follow(trainer: psutil.Process, on_wait: Callable[[], None]) -> int | None:
    while True:
        on_wait()
        try:
            status: int | None = trainer.wait(_POLL_SECONDS)
        except psutil.TimeoutExpired:
            continue
        return status
