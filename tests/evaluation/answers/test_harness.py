"""The parent's side, with real children; faults are real signals."""

import array
import fcntl
import json
import shutil
import signal
import subprocess
import sys
import termios
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import psutil
import pytest
from filelock import FileLock

from evaluation.answers import worker
from evaluation.answers.harness import Progress, evaluate
from evaluation.answers.job import Assignment, Job
from evaluation.benchmarks.benchmark import write_benchmark
from evaluation.child import ChildJob, kept_children
from evaluation.errors import BenchmarkError, DeviceError, ModelError, WorkerError
from evaluation.verdict.report import Report
from tests.evaluation.conftest import workers, written


@pytest.fixture(scope="session")
def shout(problems: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a second benchmark on some of the same problems."""
    return write_benchmark(tmp_path_factory.mktemp("benchmarks"), "shout", problems[:4], max_new_tokens=8, stop=["5"])


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def reports(model: Path, benchmark: Path, shout: Path, cache: Path) -> list[Report]:
    """Return the reports of two benchmarks scored by one child without interruption."""
    return [each.report for each in evaluate(model, [benchmark, shout], cache=cache, batch_size=1)]


@pytest.fixture(scope="session")
def long_benchmark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a benchmark that keeps a worker busy for many seconds."""
    problems = [{"prompt": f"{number}+", "answer": "no"} for number in range(2000)]
    return write_benchmark(tmp_path_factory.mktemp("benchmarks"), "long", problems, max_new_tokens=40)


def chunks(cache: Path, benchmark: str) -> list[str]:
    """Return the key of every chunk in the journal, in the order of generation, whole lines only."""
    (journal,) = cache.glob(f"{benchmark}-*/journal.jsonl")
    return [json.loads(line)["chunk"] for line in journal.read_text().splitlines(keepends=True) if line.endswith("\n")]


def test_one_child_scores_a_model_on_every_benchmark(reports: list[Report], model: Path) -> None:
    assert [report.benchmark for report in reports] == ["plus", "shout"]
    assert [report.n for report in reports] == [12, 4]
    assert reports[0].accuracy == pytest.approx(1 / 3)
    assert reports[0].model == str(model)
    settings = reports[0].settings
    assert settings["dtype"] == "float32"
    assert (settings["batch_size"], settings["max_new_tokens"], settings["temperature"]) == (1, 40, 0.0)
    assert reports[0].seconds > 0


def test_what_the_cache_holds_is_returned_without_a_child(
    reports: list[Report], model: Path, benchmark: Path, shout: Path, *, cache: Path, tmp_path: Path
) -> None:
    # A child would empty its log as it starts.
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
    again = [each.report for each in evaluate(copy, [shout, benchmark], cache=cache, batch_size=1)]
    assert [report.scores for report in again] == [reports[1].scores, reports[0].scores]
    assert again[0].model == str(copy)
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()} == before


def test_a_kept_child_scores_model_after_model_to_the_same_bytes(
    reports: list[Report], model: Path, other_model: Path, benchmark: Path, shout: Path, *, cache: Path, tmp_path: Path
) -> None:
    seen: set[int] = set()

    def note(_: Progress) -> None:
        seen.update(worker.pid for worker in workers(psutil.Process()))

    with kept_children():
        evaluate(other_model, [shout], cache=tmp_path / "other", batch_size=5, on_progress=note)
        # What a benchmark or a model is refused for leaves nothing behind either.
        long = write_benchmark(tmp_path, "plus", [{"prompt": "1" * 70, "answer": "no"}], max_new_tokens=8)
        with pytest.raises(BenchmarkError, match="problem 0 of plus has 71 tokens"):
            evaluate(other_model, [long], cache=tmp_path / "other")
        again = evaluate(model, [benchmark, shout], cache=tmp_path / "kept", batch_size=1, on_progress=note)
    assert len(seen) == 1
    assert [each.report for each in again] == reports
    for ours in again:
        (theirs,) = cache.glob(f"{ours.report.benchmark}-*")
        assert written(ours.results.parent) == written(theirs)


@kept_children()
def test_a_killed_child_resumes_without_paying_twice_whatever_the_limit(
    reports: list[Report], model: Path, benchmark: Path, tmp_path: Path
) -> None:
    def kill(progress: Progress) -> None:
        if progress.done == 3:
            (worker,) = workers(psutil.Process())
            worker.send_signal(signal.SIGKILL)

    with pytest.raises(WorkerError, match=r"on plus was killed by SIGKILL; finished answers are kept, evaluate again"):
        evaluate(model, [benchmark], cache=tmp_path, batch_size=1, limit=6, on_progress=kill)
    kept = chunks(tmp_path, "plus")
    assert 3 <= len(kept) < 6
    assert not list(tmp_path.rglob("report*.json"))

    seen: list[int] = []
    (evaluated,) = evaluate(
        model, [benchmark], cache=tmp_path, batch_size=1, on_progress=lambda progress: seen.append(progress.done)
    )
    whole = evaluated.report
    assert whole == reports[0]
    assert seen == list(range(1, 13))
    everything = chunks(tmp_path, "plus")
    assert everything[: len(kept)] == kept
    assert len(everything) == len(set(everything)) == 12

    first = evaluate(model, [benchmark], cache=tmp_path, batch_size=1, limit=6)[0].report
    assert chunks(tmp_path, "plus") == everything
    assert first.scores == whole.scores[:6]
    assert first.settings == {**whole.settings, "limit": 6}
    assert 0 < first.seconds < whole.seconds
    # Neither report is in the other's place.
    assert evaluate(model, [benchmark], cache=tmp_path, batch_size=1) == [evaluated]


def test_two_evaluations_at_once_share_one_journal(model: Path, benchmark: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(evaluate, model, [benchmark, benchmark], cache=tmp_path, batch_size=5) for _ in range(2)]
    first, second = (each.result() for each in both)
    assert first == second
    assert len(chunks(tmp_path, "plus")) == 3


def test_a_second_evaluation_waits_for_the_first_and_takes_its_report(
    reports: list[Report], model: Path, benchmark: Path, *, cache: Path, tmp_path: Path
) -> None:
    (finished,) = cache.glob("plus-*")
    directory = tmp_path / finished.name
    directory.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(directory / "lock"):
            waiting = pool.submit(evaluate, model, [benchmark], cache=tmp_path, batch_size=1)
            while not workers(psutil.Process()):
                time.sleep(0.01)
            # Long enough for a worker that would not wait to see that there is no report yet.
            time.sleep(1.5)
            for name in ("results.json", "samples.jsonl", "report.json"):
                shutil.copy(finished / name, directory)
        assert [each.report for each in waiting.result()] == reports[:1]
    # Loading a model leaves warnings there.
    assert (directory / "worker.log").read_bytes() == b""


def test_a_killed_parent_leaves_no_child(model: Path, long_benchmark: Path, tmp_path: Path) -> None:
    script = f"""
        from pathlib import Path
        from evaluation.answers.harness import evaluate
        model, benchmark, cache = {str(model)!r}, {str(long_benchmark)!r}, {str(tmp_path)!r}
        say = lambda progress: print(progress.done, flush=True)
        evaluate(Path(model), [benchmark], cache=Path(cache), batch_size=1, on_progress=say)
    """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE) as parent:
        try:
            assert parent.stdout is not None
            assert parent.stdout.readline() == b"1\n"
            (worker,) = workers(psutil.Process(parent.pid))
        finally:
            parent.kill()
    assert gone(worker)
    assert len(chunks(tmp_path, "long")) < 2000


@pytest.fixture
def long_job(model: Path, long_benchmark: Path, tmp_path: Path) -> Job:
    assignment = Assignment(
        benchmark="long",
        benchmark_path=str(long_benchmark),
        benchmark_digest="b",
        model_digest="m",
        settings={},
        cache=str(tmp_path),
    )
    assignment.directory.mkdir()
    return Job(model, device="cpu", dtype="float32", batch_size=1, limit=None, assignments=(assignment,))


def test_a_worker_whose_input_ends_exits_without_the_help_of_the_kernel(long_job: Job) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "evaluation.answers.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    ) as worker:
        try:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(message(long_job))
            worker.stdin.flush()
            assert json.loads(worker.stdout.readline())["done"] == 1
            worker.stdin.close()
            assert worker.wait(timeout=120) == 1
        finally:
            worker.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux alone kills orphans on request")
def test_a_worker_dies_with_its_parent_even_if_its_input_stays_open(long_job: Job) -> None:
    lock = long_job.assignments[0].directory / "lock"
    script = "import subprocess, sys; subprocess.run([sys.executable, '-m', 'evaluation.answers.worker'])"
    with (
        FileLock(lock),
        subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as parent,
    ):
        try:
            assert parent.stdin is not None
            parent.stdin.write(message(long_job))
            parent.stdin.flush()
            while not (alive := workers(psutil.Process(parent.pid))):
                time.sleep(0.01)
            # It reads its job and then waits, since the test holds the lock.
            while unread(parent.stdin.fileno()):
                time.sleep(0.01)
        finally:
            parent.kill()
        assert gone(alive[0])


def message(job: Job) -> bytes:
    return ChildJob(job.to_line(), job.assignments[0].directory / "worker.log").message(more=False)


def unread(pipe: int) -> int:
    """Return how many bytes lie in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


def gone(process: psutil.Process) -> bool:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    process.kill()
    return False


def test_a_worker_that_fails_is_quoted_and_its_log_named(
    model: Path, edited: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = edited("evaluation.grading.score_exact_match", "marks.score")
    # What a library prints must not reach the parent as an event.
    (path.parent / "marks.py").write_text("def score(problem, results):\n    print('marking')\n    return 1 // 0\n")
    with pytest.raises(WorkerError, match=r"failed with exit code 1: ZeroDivisionError: .* \(more in .*worker\.log\)"):
        evaluate(model, [path], cache=tmp_path, limit=1)


def test_a_device_this_machine_lacks_is_refused(model: Path, benchmark: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"device cuda:99 was asked for and this machine has \d+ CUDA devices"):
        evaluate(model, [benchmark], cache=tmp_path, device="cuda:99")


def test_bad_input_is_refused_before_a_child_starts(model: Path, benchmark: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ModelError, match="is not a directory"):
        evaluate(tmp_path / "absent", [benchmark], cache=cache)
    with pytest.raises(BenchmarkError, match="benchmark nonsense is no file, not shipped"):
        evaluate(model, [benchmark, "nonsense"], cache=cache)
    with pytest.raises(DeviceError, match="device is gpu and must be cpu, cuda or cuda:N"):
        evaluate(model, [benchmark], cache=cache, device="gpu")
    with pytest.raises(ModelError, match=r"dtype of .* is int8 and must be one of float32"):
        evaluate(model, [benchmark], cache=cache, dtype="int8")
    with pytest.raises(BenchmarkError, match="batch_size is 0 and must be at least 1"):
        evaluate(model, [benchmark], cache=cache, batch_size=0)
    with pytest.raises(BenchmarkError, match="limit is 0 and must be at least 1"):
        evaluate(model, [benchmark], cache=cache, limit=0)
    assert not cache.exists()


def test_a_model_that_states_no_dtype_is_refused(model: Path, benchmark: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["dtype"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"config\.json states no dtype: pass dtype, one of float32"):
        evaluate(copy, [benchmark], cache=tmp_path / "cache")


def test_what_says_that_an_evaluation_is_done_comes_after_all_else_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(worker, "gc", Mock())
    monkeypatch.setattr(worker, "_place", lambda *_: nullcontext())
    monkeypatch.setattr(worker, "load_task", Mock())
    monkeypatch.setattr(worker, "_load_lm", Mock())
    monkeypatch.setattr(worker, "write_details", lambda *_, **__: done.append("details"))
    report = Mock(write=lambda _: done.append("report"))
    monkeypatch.setattr(worker, "score", lambda *_, **__: (report, {}))
    assignment = Mock(complete=False)
    assignment.lock_path.return_value = tmp_path / "lock"
    assignment.journal_path.return_value = tmp_path / "journal"
    assignment.other_journals.return_value = []
    worker.run(Mock(assignments=[assignment], device="cpu"), send=Mock())
    assert done == ["details", "report"]
