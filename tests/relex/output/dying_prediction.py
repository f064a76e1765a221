"""A prediction cut short with kill -9 at a chosen point: `dying_prediction.py ROOT OUT POINT…`.

Each point is a child of its own. ROOT holds base/ and run/; the output of a point goes to OUT/POINT. Points:
`rename-N` (before the Nth renaming: the shards in turn, then the directory), `open-NAME` (before that file is
opened), `progress-N` (after the Nth piece), `wait` (stands still after the first piece, holding its lock, until it is
killed from outside).
"""

import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from relex.output.materialise import Output, materialise
from relex.trajectory import Trajectory
from tests.helpers.trajectories import MIB, Run, predict


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def run(trajectory: Trajectory, out: Path, point: str) -> None:
    kind, _, which = point.partition("-")
    made = predict(trajectory)
    renamings, pieces = 0, 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal renamings
        if kind == "rename" and event == "os.rename":
            renamings += 1
            if renamings == int(which):
                die()
        if kind == "open" and event == "open" and Path(str(arguments[0])).name == which:
            die()

    def on_progress(done: int, total: int) -> None:
        nonlocal pieces
        pieces += 1
        if kind == "progress" and pieces == int(which):
            die()
        if kind == "wait":
            sys.stdout.write("writing\n")
            sys.stdout.flush()
            time.sleep(600)

    sys.addaudithook(hook)
    materialise(trajectory, [Output(made, out / point)], memory=64 * MIB, threads=2, on_progress=on_progress)


def main(root: Path, out: Path, points: list[str]) -> None:
    trajectory = Run(root / "base", root / "run").open()
    for point in points:
        child = os.fork()
        if child == 0:
            run(trajectory, out, point)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{point} {os.waitstatus_to_exitcode(status)}\n")


if __name__ == "__main__":
    if sys.argv[3:] == ["wait"]:
        root = Path(sys.argv[1])
        run(Run(root / "base", root / "run").open(), Path(sys.argv[2]), "wait")
    else:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
