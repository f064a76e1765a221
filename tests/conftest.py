"""What holds for every test: one thread a process, a home of its own, and nothing left running."""

import logging
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path

# Two threads fight over models of this size, and the tests' processes over the cores; inherited by every child.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Set by the first process of a session, inherited by its workers and by all that tests start: so they are found again.
MARK = "RELEX_TEST_SESSION"
FIRST = MARK not in os.environ
os.environ.setdefault(MARK, uuid.uuid4().hex)
# Neither a person's stack and cache nor that of the other worker.
HOME = Path(tempfile.mkdtemp(prefix="relex-tests-"))
os.environ["RELEX_HOME"] = str(HOME / "relex")
os.environ["PREFECT_HOME"] = str(HOME / "prefect")

# No test cuts the power, and waiting for the disk is a large part of what writes small files do.
os.fsync = lambda fd: None

import hypothesis
import psutil
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

# The same examples in every run, however slow the machine; `make soak` looks for others.
hypothesis.settings.register_profile("gate", derandomize=True, deadline=None, database=None)
hypothesis.settings.register_profile("soak", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "gate"))

STACK = "tests/integration/stack/"
# Of these a flow that runs in this process shows more than warnings.
OWN_LOGGERS = ("flows", "relex", "evaluation", "deploy")
# How long a process that was told to end may take.
_ENDING_SECONDS = 20.0


class _Scheduling(LoadScopeScheduling):  # type: ignore[misc]
    """A file to a worker, whose fixtures it makes once; to one worker all files that share the servers."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", maxsplit=1)[0]
        return STACK if file.startswith(STACK) else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _Scheduling:
    # Not --dist loadgroup: with pytest 9.2, xdist 3.8 does not see the groups.
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest: what shares the servers, then files with slow tests."""
    slow = {each.path for each in items if each.get_closest_marker("slow")}
    items.sort(key=lambda entry: (not entry.nodeid.startswith(STACK), entry.path not in slow))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a session that leaves processes."""
    if FIRST:
        end = time.monotonic() + _ENDING_SECONDS
        while (left := _left()) and time.monotonic() < end:
            time.sleep(0.2)
        for line in left:
            session.config.get_terminal_writer().line(f"left running: {line}", red=True)
        if left:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
    shutil.rmtree(HOME, ignore_errors=True)


def _left() -> list[str]:
    """Return the processes of this session other than this one and those that started it."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid in own or process.environ().get(MARK) != os.environ[MARK]:
                continue
            command = " ".join(process.cmdline())
            # The child that compares answers is kept, and ends with its parent.
            if not (process.ppid() == os.getpid() and "evaluation.grading.equality" in command):
                left.append(f"{process.pid} {command[:200]}")
        except psutil.Error:
            continue
    return left


@pytest.fixture(autouse=True)
def levels_of_our_loggers() -> None:
    """Begin every test with the levels of a fresh process, whatever ran in this one before."""
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)
