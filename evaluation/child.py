"""Child: a process of its own for what loads models or data sets, and the pipe between it and its parent.

The parent writes one line and reads events, one JSON object a line. Neither side outlives the other.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any, TypeAlias

from evaluation import errors
from evaluation.errors import EvaluationError

Send: TypeAlias = Callable[[Mapping[str, Any]], None]

PR_SET_PDEATHSIG = 1
# lm-eval forks a pool for the error of some metrics, which is no good with a model in memory.
ENVIRONMENT = {
    "DISABLE_MULTIPROC": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


@dataclass(frozen=True)
class ChildJob:
    """What one child reads, one line, and where its output goes."""

    line: bytes
    log_path: Path


def run_child(module: str, line: bytes, *, log_path: Path, on_event: Callable[[Mapping[str, Any]], None]) -> int:
    """Run `python -m module` on one line, its output going to `log_path`, and return its exit status.

    Raises what the child refused, an EvaluationError.
    """
    return run_children(module, [ChildJob(line, log_path)], on_event=lambda _, event: on_event(event))[0]


def run_children(
    module: str, jobs: Sequence[ChildJob], *, on_event: Callable[[int, Mapping[str, Any]], None]
) -> list[int]:
    """Run one `python -m module` a job, all at once, and return their exit statuses.

    `on_event` gets the number of the job with each event. One that dies lets the others finish; one that refuses
    ends them all, and what it refused is raised, an EvaluationError.
    """
    with ExitStack() as stack, DefaultSelector() as events:
        children = [stack.enter_context(_start(module, job)) for job in jobs]
        for number, (child, job) in enumerate(zip(children, jobs, strict=True)):
            assert child.stdin is not None
            assert child.stdout is not None
            events.register(child.stdout.fileno(), EVENT_READ, (number, bytearray()))
            # It is already dead, which its status says.
            with suppress(BrokenPipeError):
                child.stdin.write(job.line)
                child.stdin.flush()
        while events.get_map():
            for key, _ in events.select():
                number, unread = key.data
                data = os.read(key.fd, 1 << 16)
                if not data:
                    events.unregister(key.fd)
                unread += data
                *lines, unread[:] = unread.split(b"\n")
                for line in lines:
                    event = json.loads(line)
                    if event["event"] == "refused":
                        raise getattr(errors, event["kind"])(event["message"])
                    on_event(number, event)
        return [child.wait() for child in children]


@contextmanager
def _start(module: str, job: ChildJob) -> Iterator[subprocess.Popen[bytes]]:
    with (
        job.log_path.open("wb") as log,
        # A session of its own: an interrupt at the terminal reaches the parent, which ends the child in its own time.
        subprocess.Popen(
            # -P: a package `evaluation` of the directory one happens to be in is not ours.
            [sys.executable, "-P", "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        ) as child,
    ):
        try:
            yield child
        finally:
            child.kill()


def run_as_child(work: Callable[[bytes, Send], None]) -> None:
    """Do the work of a child on the line its parent wrote; exit 1 after naming the reason for what it refuses."""
    send = _channel()
    die_with_parent()
    line = _first_line()
    threading.Thread(target=_exit_at_end_of_input, daemon=True).start()
    try:
        work(line, send)
    except EvaluationError as error:
        send({"event": "refused", "kind": type(error).__name__, "message": str(error)})
        sys.exit(1)


def last_log_line(log_path: Path) -> str:
    """Return the last line that a child which failed wrote to its log."""
    lines = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "it wrote nothing"


def _channel() -> Send:
    # Libraries print: standard output becomes standard error, and the events have the original to themselves.
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(event: Mapping[str, Any]) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    return send


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends, however that ends and whatever this one computes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _first_line() -> bytes:
    # Unbuffered: what follows the line belongs to the thread that waits for the end of the input.
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(sys.stdin.fileno(), 1)
        if not byte:
            os._exit(1)
        line += byte
    return bytes(line)


def _exit_at_end_of_input() -> None:
    # The parent never closes its end: end of input means that it is gone, on any platform.
    while os.read(sys.stdin.fileno(), 1):
        pass
    os._exit(1)
