"""Registers a model in child processes that kill themselves at a chosen step; run by test_registry_faults.

    dying_register.py MODEL TEMPLATE HOMES STRIDE    prints JSON: {"steps": steps of an undisturbed run, "homes": […]}

TEMPLATE is a database to start from, or "-" to let the child set its store up.
"""

import json
import os
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from deploy.registry import register


def watch(step: Callable[[], None]) -> None:
    """Call `step` before every change this process makes to the file system or a database."""

    def heard(name: str, arguments: tuple[object, ...]) -> None:
        if name in ("os.link", "os.rename", "os.mkdir"):
            step()

    writing = set()

    def executes(connection: object, cursor: object, statement: str, *rest: object) -> None:
        if statement.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE", "CREATE", "ALTER")):
            writing.add(connection)

    def commits(connection: object) -> None:
        if connection in writing:
            writing.remove(connection)
            step()

    sys.addaudithook(heard)
    event.listen(Engine, "before_cursor_execute", executes)
    event.listen(Engine, "commit", commits)


def child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            if code:
                traceback.print_exc()
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def _register(model: Path, home: Path) -> None:
    register(model, name="tiny", tracking_uri=f"sqlite:///{home}/mlflow.db", metrics={"accuracy": 0.5})


def _count(model: Path, home: Path) -> int:
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    def work() -> None:
        watch(step)
        _register(model, home)
        (home / "steps").write_text(str(steps))

    assert child(work) == 0
    return int((home / "steps").read_text())


def _die(model: Path, home: Path, last: int) -> None:
    left = last

    def step() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def work() -> None:
        watch(step)
        _register(model, home)

    assert child(work) == signal.SIGKILL


def main(model: Path, template: str, homes: Path, stride: int) -> None:
    # Imports everything once, before the forks.
    _register(model, homes / "warm")
    assert threading.active_count() == 1

    def home(name: str) -> Path:
        (homes / name).mkdir()
        if template != "-":
            shutil.copy(template, homes / name / "mlflow.db")
        return homes / name

    steps = _count(model, home("undisturbed"))
    killed = []
    # Before the last step the version is there and its model does not know it yet.
    for last in sorted({*range(0, steps, stride), steps - 1}):
        killed.append(home(f"killed-before-{last}"))
        _die(model, killed[-1], last)
        assert child(lambda: _register(model, killed[-1])) == 0
    sys.stdout.write(json.dumps({"steps": steps, "homes": [str(path) for path in killed]}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
