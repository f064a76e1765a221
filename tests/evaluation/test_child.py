"""Children that are kept, with real processes and real signals."""

import contextvars
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from evaluation.child import ChildJob, kept_children, last_log_line, run_child, run_children
from evaluation.errors import ModelError
from tests.helpers import ROOT

MODULE = "tests.evaluation.obedient"
Ask = Callable[..., tuple[int, int]]


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Return a function that has a child do a word and returns its status and its process."""

    def run(word: str, *, device: str = "", during: Callable[[], object] = lambda: None) -> tuple[int, int]:
        begun: list[Mapping[str, Any]] = []

        def on_event(_: int, event: Mapping[str, Any]) -> None:
            begun.append(event)
            during()

        job = ChildJob(json.dumps(word).encode() + b"\n", tmp_path / f"{word}.log", device)
        (status,) = run_children(MODULE, [job], on_event=on_event)
        assert [event["event"] for event in begun] == ["begun"]
        return status, begun[0]["pid"]

    return run


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_child_has_one_job_and_a_kept_one_those_of_its_block(ask: Ask) -> None:
    assert len({ask(word) for word in ("one", "two")}) == 2
    with kept_children():
        first, second = ask("one"), ask("two")
        with kept_children():
            assert ask("three") == second == first
        assert ask("four") == first
        assert first[0] == 0
    assert gone(first[1])
    assert ask("five") != first


def test_what_a_job_writes_lies_in_its_own_log(ask: Ask, tmp_path: Path) -> None:
    with kept_children():
        for word in ("one", "two", "one"):
            ask(word)
            for each in tmp_path.glob("*.log"):
                assert set(each.read_text().splitlines()) == {
                    f"{said} {each.stem}" for said in ("printed", "logged", "ran")
                }


def test_a_refusal_leaves_a_child_that_goes_on(ask: Ask) -> None:
    with kept_children():
        pid = ask("one")
        with pytest.raises(ModelError, match="it is no model"):
            ask("refuse")
        assert ask("two") == pid
    with pytest.raises(ModelError, match="it is no model"):
        ask("refuse")


def test_a_crash_says_why_and_the_next_job_has_a_new_child(ask: Ask, tmp_path: Path) -> None:
    with kept_children():
        _, pid = ask("one")
        assert ask("crash") == (1, pid)
        assert last_log_line(tmp_path / "crash.log") == "KeyError: 'crash'"
        assert "KeyError" not in (tmp_path / "one.log").read_text()
        assert ask("two")[1] != pid


def test_a_child_that_is_killed_fails_its_job_and_an_idle_one_none(ask: Ask) -> None:
    with kept_children():
        _, pid = ask("one")
        assert ask("die") == (-signal.SIGKILL, pid)
        status, second = ask("two")
        assert (status, second != pid) == (0, True)
        os.kill(second, signal.SIGKILL)
        os.waitid(os.P_PID, second, os.WEXITED | os.WNOWAIT)
        status, third = ask("three")
        assert (status, third != second) == (0, True)


def test_a_job_that_a_child_hands_back_is_done_by_another(ask: Ask) -> None:
    with kept_children():
        _, first = ask("one")
        status, second = ask("first")
        assert (status, gone(first)) == (0, True)
        assert ask("two") == (0, second)


def test_calls_at_once_have_a_child_each(ask: Ask) -> None:
    with kept_children():
        _, first = ask("one")
        inside: list[tuple[int, int]] = []
        assert ask("two", during=lambda: inside.append(ask("three"))) == (0, first)
        ((_, second),) = inside
        assert second != first
        # In threads too, which are no part of the block unless they have its context.
        context = contextvars.copy_context()
        with ThreadPoolExecutor() as pool:
            barrier = threading.Barrier(2, timeout=60)
            alone = pool.submit(ask, "four", during=barrier.wait)
            part = pool.submit(context.run, lambda: ask("five", during=barrier.wait))
            assert part.result()[1] in (first, second)
            assert alone.result()[1] not in (first, second)
        assert {ask("six", during=lambda: inside.append(ask("seven")))[1], inside[1][1]} == {first, second}


def test_a_child_outlives_the_thread_that_asked_for_it(ask: Ask) -> None:
    """The kernel ends a process with the thread that started it."""
    with kept_children():
        collected: list[tuple[int, int]] = []
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(lambda: collected.append(ask("one")),))
        thread.start()
        thread.join()
        assert ask("two") == collected[0]


def test_a_child_goes_on_only_where_it_was_started_for_the_same(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with kept_children():
        first = ask("one", device="cuda:0")
        other = ask("one", device="cuda:1")
        assert other != first
        with monkeypatch.context() as changed:
            changed.setenv("WORD", "changed")
            assert ask("one", device="cuda:0") not in (first, other)
        with monkeypatch.context() as changed:
            changed.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")
            assert ask("one", device="cuda:0") == first
        with monkeypatch.context() as changed:
            changed.chdir(tmp_path)
            assert ask("one", device="cuda:0") not in (first, other)
        assert ask("one", device="cuda:1") == other
        assert ask("one", device="cuda:0") == first


def test_several_jobs_at_once_have_the_same_children_again_and_a_single_child_is_not_kept(tmp_path: Path) -> None:
    def all_at_once() -> dict[int, int]:
        seen: dict[int, int] = {}
        jobs = [ChildJob(b'"one"\n', tmp_path / f"{number}.log") for number in range(2)]
        codes = run_children(MODULE, jobs, on_event=lambda number, event: seen.update({number: event["pid"]}))
        assert codes == [0, 0]
        return seen

    with kept_children():
        first = all_at_once()
        assert all_at_once() == first
        seen: list[int] = []
        log_path = tmp_path / "single.log"
        assert run_child(MODULE, b'"two"\n', log_path=log_path, on_event=lambda each: seen.append(each["pid"])) == 0
        assert seen[0] not in first.values()
        assert gone(seen[0])


def test_what_interrupts_a_call_ends_its_child(ask: Ask) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with kept_children():
        _, pid = ask("one")
        with pytest.raises(KeyboardInterrupt):
            ask("sleep", during=interrupt)
        assert gone(pid)
        assert ask("two")[0] == 0


def test_an_idle_child_ends_with_its_parent(tmp_path: Path) -> None:
    script = f"""
        import time
        from pathlib import Path
        from evaluation.child import ChildJob, kept_children, run_children
        with kept_children():
            job = ChildJob(b'"one"' + bytes([10]), Path({str(tmp_path / "log")!r}))
            run_children({MODULE!r}, [job], on_event=lambda _, event: print(event["pid"], flush=True))
            print("idle", flush=True)
            time.sleep(600)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, cwd=ROOT) as parent:
        try:
            assert parent.stdout is not None
            child = psutil.Process(int(parent.stdout.readline()))
            assert parent.stdout.readline() == b"idle\n"
        finally:
            parent.kill()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
