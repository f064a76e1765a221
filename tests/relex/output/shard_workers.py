"""A prediction written by processes: `shard_workers.py ROOT OUT WORKERS POINT`, which says who began which shard.

ROOT holds base/ and run/. The shards are dealt out to WORKERS processes, and what a dead one left is dealt out again.
POINT is `none`, or `truncate` or `rename`: the worker of the second shard is killed with a file that is half written,
or whole and not yet named.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from relex.extrapolation import Request, extrapolate
from relex.output.shards import Shard, Spread, write_shard
from relex.predictors import parse_method
from relex.progress import Progress
from tests.helpers.trajectories import MIB, Run

SHARD_SIZE = 2 * MIB
METHODS = ("relex:rank=2", "relex-pinned:damping=0.3", "alpha-rl", "hold")
TARGETS = (200, 300)


def ask(root: Path, out: Path, *, spread: Spread | None = None) -> None:
    """Ask for every method at every target below `out`."""
    requests = [
        Request(parse_method(spec), target, out / spec / f"step-{target}") for spec in METHODS for target in TARGETS
    ]
    extrapolate(
        Run(root / "base", root / "run").open(),
        requests,
        grams=root / "grams",
        memory=64 * MIB,
        threads=1,
        shard_size=SHARD_SIZE,
        spread=spread,
    )


def work(shards: Sequence[Shard], dies_at: str, point: str) -> None:
    current, happened = "", 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal happened
        if event == "open" and str(arguments[0]).endswith(".tmp") and int(str(arguments[2])) & os.O_WRONLY:
            # One write: the lines of several processes do not mix.
            os.write(1, f"{os.getpid()} {arguments[0]}\n".encode())
        if event == f"os.{point}" and current == dies_at:
            happened += 1
            # By then one of the outputs has its file, and the next one has not.
            if happened == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    for shard in shards:
        current = shard.file
        write_shard(shard)


def main(root: Path, out: Path, workers: int, point: str) -> None:
    def spread(shards: Sequence[Shard], on_progress: Progress | None) -> None:
        dies_at = "" if point == "none" else shards[1].file
        children = {fork(mine, dies_at, point): mine for mine in (shards[n::workers] for n in range(workers))}
        for child, mine in children.items():
            _, status = os.waitpid(child, 0)
            if status:
                assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
                _, status = os.waitpid(fork(mine, "", point), 0)
                assert status == 0

    ask(root, out, spread=spread)


def fork(shards: Sequence[Shard], dies_at: str, point: str) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work(shards, dies_at, point)
            code = 0
        finally:
            os._exit(code)
    return child


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
