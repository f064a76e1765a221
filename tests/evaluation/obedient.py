"""A child that does what its lines say, a word a job: `python -m tests.evaluation.obedient`."""

import json
import os
import signal
import sys
import time

from evaluation.child import HandedBack, Send, run_as_child
from evaluation.errors import ModelError

JOBS: list[str] = []


def obey(line: bytes, send: Send, more: bool) -> None:
    word = json.loads(line)
    JOBS.append(word)
    if word == "first" and len(JOBS) > 1:
        raise HandedBack
    send({"event": "begun", "pid": os.getpid()})
    if word == "refuse":
        raise ModelError("it is no model")
    if word == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if word == "crash":
        raise KeyError(word)
    if word == "sleep":
        time.sleep(600)
    sys.stdout.write(f"printed {word}\n")
    sys.stderr.write(f"logged {word}\n")
    os.system(f"echo ran {word}")


if __name__ == "__main__":
    run_as_child(obey)
