"""The guard of one inference engine, `python -m deploy.serving.guard DIRECTORY COMMAND…`.

It runs the command in the directory and holds a pipe as its standard input. However the process at the other end of it
ends, kill -9 included, the pipe ends with it, and then the engine and everything it started are ended, too: SIGTERM,
and SIGKILL for what is left 10 s later.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_TERM_SECONDS = 10.0
_KILL_SECONDS = 5.0


def main() -> None:
    """Run the command until it ends or the input does; exit with its status."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    engine = subprocess.Popen(
        sys.argv[2:],
        cwd=sys.argv[1],
        stdin=subprocess.DEVNULL,
        # There is one thread yet. For an engine whose guard is killed.
        preexec_fn=_die_with_parent,  # noqa: PLW1509
    )
    threading.Thread(target=_end_with_input, args=(engine,), daemon=True).start()
    code = engine.wait()
    # What the engine leaves behind becomes this process's child, whatever session it lives in.
    while left := psutil.Process().children(recursive=True):
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=_KILL_SECONDS)
    sys.exit(code if code >= 0 else 128 - code)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_with_input(engine: "subprocess.Popen[bytes]") -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    engine.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        engine.wait(_TERM_SECONDS)
    engine.kill()


if __name__ == "__main__":
    main()
