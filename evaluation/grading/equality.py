"""Equality: a process that says whether two LaTeX expressions are equal, `python -m evaluation.grading.equality`.

What a model writes can take a computer algebra system for ever, in code that no signal handler of Python's interrupts,
or all memory. So it is read in a process of its own, which the kernel bounds in memory and ends after seconds of
computing, and which is started again for the next answer. It is never executed.
"""

import atexit
import json
import resource
import select
import signal
import subprocess
import sys
from functools import cache

from evaluation.child import die_with_parent
from evaluation.errors import WorkerError

# Of computing, not of waiting: how busy the machine is must not change a score.
SECONDS = 5.0
MEMORY = 4 << 30
# Only for a process that neither computes nor answers.
LONGEST_WAIT = 120.0
READY = b"ready\n"
# What sympy raises where an expression has no value that it finds.
UNDECIDED = (ArithmeticError, AttributeError, NotImplementedError, RecursionError, TypeError, ValueError)


class Comparer:
    """The process, started when first asked and again after it was ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, answer: str, gold: str) -> bool:
        """Return whether the expressions are equal, False when that cannot be decided within the limits.

        Raises WorkerError when the process cannot be started.
        """
        process = self._process
        if process is None or process.poll() is not None:
            # Whatever ended one that was not asked anything says nothing about this answer.
            self.close()
            process = self._start()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps([answer, gold]).encode() + b"\n")
            process.stdin.flush()
            verdict = _line(process)
        except BrokenPipeError:
            verdict = b""
        if not verdict:
            self.close()
        return verdict == b"true\n"

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-P", "-m", "evaluation.grading.equality", str(SECONDS)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Without this an installation that lacks sympy would score every model zero.
        if _line(self._process) != READY:
            self.close()
            raise WorkerError(
                "the process that compares answers does not start:"
                " run python -m evaluation.grading.equality to see why."
            )
        return self._process


@cache
def comparer() -> Comparer:
    """Return the comparer that this process keeps until it ends."""
    kept = Comparer()
    atexit.register(kept.close)
    return kept


def _line(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], LONGEST_WAIT)
    return process.stdout.readline() if ready else b""


def main() -> None:
    """Answer a line of JSON, [answer, gold], with true or false, until there are no more; the argument is the limit."""
    die_with_parent()
    # Whoever started the parent may have ignored or blocked it, which children inherit.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    from evaluation.grading.comparison import same_answer

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout.write(READY.decode())
    sys.stdout.flush()
    seconds = float(sys.argv[1])
    for line in sys.stdin.buffer:
        # Its default action ends the process wherever it computes.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        answer, gold = json.loads(line)
        try:
            verdict = same_answer(answer, gold)
        except UNDECIDED:
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(verdict) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
