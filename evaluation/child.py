"""Child: a process of its own for what loads models or data sets, and the pipe between it and its parent.

The parent writes a line a job and reads events, one JSON object a line. Neither side outlives the other. A child does
one job and ends, unless children are kept: then it waits for the next one.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from typing import IO, Any, TypeAlias

from evaluation import errors
from evaluation.errors import EvaluationError

Send: TypeAlias = Callable[[Mapping[str, Any]], None]


class HandedBack(Exception):  # nothing went wrong
    """What this child keeps of earlier jobs does not serve this one: another child is to do it."""


PR_SET_PDEATHSIG = 1
# lm-eval forks a pool for the error of some metrics, which is no good with a model in memory.
ENVIRONMENT = {
    "DISABLE_MULTIPROC": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

# What no child reads, and a decision sets on its way.
UNREAD = ("MLFLOW_", "PREFECT_")


@dataclass(frozen=True)
class ChildJob:
    """What one child reads, one line, and where its output goes.

    A kept child does another job only on the same `device`: what it has once made of a GPU is not undone.
    """

    line: bytes
    log_path: Path
    device: str = ""

    def message(self, *, more: bool) -> bytes:
        """Return what the child's input is given; with `more` it does not end after this job."""
        return json.dumps({"job": self.line.decode(), "log": str(self.log_path), "more": more}).encode() + b"\n"


def run_child(module: str, line: bytes, *, log_path: Path, on_event: Callable[[Mapping[str, Any]], None]) -> int:
    """Run `python -m module` on one line, its output going to `log_path`, and return its exit status.

    It is never kept. Raises what the child refused, an EvaluationError.
    """
    return run_children(module, [ChildJob(line, log_path)], on_event=lambda _, event: on_event(event), keep=False)[0]


def run_children(
    module: str, jobs: Sequence[ChildJob], *, on_event: Callable[[int, Mapping[str, Any]], None], keep: bool = True
) -> list[int]:
    """Run one `python -m module` a job, all at once, and return their exit statuses, 0 of one that is kept.

    Without `keep` none is, whatever the block.
    `on_event` gets the number of the job with each event. One that dies lets the others finish; one that refuses
    ends them all, and what it refused is raised, an EvaluationError.
    """
    return _run(module, jobs, on_event=on_event, kept=_kept.get() if keep else None)


@contextmanager
def kept_children() -> Iterator[None]:
    """Have `run_children` keep its children in the block, and give them the next jobs instead of starting others.

    One goes on with the jobs of the same module, number, device, environment and working directory, one job at a time;
    calls at once have a child each. Calls end inside the block, which ends the children; a block inside another is part
    of it.
    """
    if _kept.get() is not None:
        yield
        return
    kept = _Kept()
    token = _kept.set(kept)
    try:
        yield
    finally:
        _kept.reset(token)
        kept.close()


class _Child:
    """A process and what it was started for; `done` says that it has ended its job and lives."""

    def __init__(self, key: tuple[object, ...], process: "subprocess.Popen[bytes]") -> None:
        self.key = key
        self.process = process
        self.done = False

    def end(self) -> None:
        self.process.kill()
        # Leaving the block waits for it and closes the pipes, into which something may still have to go.
        with suppress(BrokenPipeError), self.process:
            pass


class _Kept:
    """Living children without a job."""

    def __init__(self) -> None:
        self._idle: list[_Child] = []
        self._lock = threading.Lock()
        # The kernel ends a child with the thread that started it: this one stays until all of them are ended.
        self.starter = ThreadPoolExecutor(1, "children")

    def take(self, key: tuple[object, ...]) -> _Child | None:
        """Return a living child that was started for the same, which is then the caller's alone."""
        with self._lock:
            for child in [each for each in self._idle if each.key == key]:
                self._idle.remove(child)
                if child.process.poll() is None:
                    child.done = False
                    return child
                child.end()
        return None

    def give(self, child: _Child) -> None:
        """Keep a child that has done its job."""
        with self._lock:
            self._idle.append(child)

    def close(self) -> None:
        """End every child."""
        with self._lock:
            for child in self._idle:
                child.end()
        self.starter.shutdown()


_kept: ContextVar[_Kept | None] = ContextVar("kept", default=None)


def _run(
    module: str,
    jobs: Sequence[ChildJob],
    *,
    on_event: Callable[[int, Mapping[str, Any]], None],
    kept: _Kept | None,
) -> list[int]:
    children: dict[int, _Child] = {}
    with ExitStack() as stack, DefaultSelector() as events:

        def begin(number: int) -> None:
            children[number] = child = stack.enter_context(_child(module, number, jobs[number], kept))
            assert child.process.stdin is not None
            assert child.process.stdout is not None
            events.register(child.process.stdout.fileno(), EVENT_READ, (number, child, bytearray()))
            # It is already dead, which its status says.
            with suppress(BrokenPipeError):
                child.process.stdin.write(jobs[number].message(more=kept is not None))
                child.process.stdin.flush()

        for number in range(len(jobs)):
            begin(number)
        while events.get_map():
            for key, _ in events.select():
                number, child, unread = key.data
                data = os.read(key.fd, 1 << 16)
                unread += data
                *lines, unread[:] = unread.split(b"\n")
                handed_back = False
                for event in map(json.loads, lines):
                    handed_back = event["event"] == "handed back"
                    child.done = kept is not None and event["event"] in ("done", "refused")
                    if event["event"] == "refused":
                        raise getattr(errors, event["kind"])(event["message"])
                    if event["event"] not in ("done", "handed back"):
                        on_event(number, event)
                if child.done or handed_back or not data:
                    events.unregister(key.fd)
                if handed_back:
                    child.end()
                    begin(number)
        return [0 if child.done else child.process.wait() for _, child in sorted(children.items())]


@contextmanager
def _child(module: str, number: int, job: ChildJob, kept: _Kept | None) -> Iterator[_Child]:
    environment = frozenset(pair for pair in os.environ.items() if not pair[0].startswith(UNREAD))
    key = (module, number, job.device, Path.cwd(), environment)
    with job.log_path.open("wb") as log:
        child = None if kept is None else kept.take(key)
        if child is None:
            start = partial(_start, module, log)
            child = _Child(key, start() if kept is None else kept.starter.submit(start).result())
    try:
        yield child
    finally:
        if kept is not None and child.done:
            kept.give(child)
        else:
            child.end()


def _start(module: str, log: IO[bytes]) -> "subprocess.Popen[bytes]":
    # A session of its own: an interrupt at the terminal reaches the parent, which ends the child in its own time.
    return subprocess.Popen(
        # -P: a package `evaluation` of the directory one happens to be in is not ours.
        [sys.executable, "-P", "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, **ENVIRONMENT},
        start_new_session=True,
    )


def run_as_child(work: Callable[[bytes, Send, bool], None]) -> None:
    """Do the work of a child on each line its parent writes, until one is the last; name the reason for a refusal.

    The work is told whether more may come. A refusal of the last exits 1.
    """
    send = _channel()
    die_with_parent()
    lines: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    more = True
    while more:
        asked = json.loads(lines.get())
        more = asked["more"]
        _log_to(asked["log"])
        ended = {"event": "done"}
        try:
            work(asked["job"].encode(), send, more)
        except HandedBack:
            ended = {"event": "handed back"}
            more = False
        except EvaluationError as error:
            ended = {"event": "refused", "kind": type(error).__name__, "message": str(error)}
        sys.stdout.flush()
        sys.stderr.flush()
        send(ended)
    if ended["event"] == "refused":
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


def _log_to(path: str) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    os.close(log)


def _read_lines(lines: "SimpleQueue[bytes]") -> None:
    # Unbuffered: a buffer's lock would be missed when the process ends while this thread waits.
    unread = bytearray()
    while data := os.read(sys.stdin.fileno(), 1 << 16):
        unread += data
        *whole, unread[:] = unread.split(b"\n")
        for line in whole:
            lines.put(bytes(line))
    # The parent never closes its end: end of input means that it is gone, on any platform.
    os._exit(1)
