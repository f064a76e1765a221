"""A re-grounding cut short with kill -9 at a chosen point: `dying_reground.py (CONFIG POINT)…`, each in a child.

Points: `train` (while the trainer is at work), `score` (while the jump is being scored), `NAME-N` (before the Nth
renaming to NAME: the moment before a phase's file or a model is there).
"""

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from flows.reground.loop import reground
from flows.reground.settings import load_reground_settings


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def run(config: Path, point: str) -> None:
    name, _, number = point.rpartition("-")
    renamings = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal renamings
        if event == "os.rename" and Path(str(arguments[1])).name == name:
            renamings += 1
            if renamings == int(number):
                die()

    def tell(what: str, done: int, total: int) -> None:
        if (point == "train" and what == "cycle 1: train" and done) or (point == "score" and "score jump" in what):
            die()

    sys.addaudithook(hook)
    reground(load_reground_settings(config), tell=tell)


def main(arguments: list[str]) -> None:
    for config, point in zip(arguments[::2], arguments[1::2], strict=True):
        child = os.fork()
        if child == 0:
            run(Path(config), point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{point} {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
