"""Several workers end in the report of one, and a device has as many evaluations at once as are allowed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from evaluation.answers.backend import Backend
from evaluation.answers.devices import mask, occupied, worker_devices
from evaluation.answers.harness import Progress, evaluate
from evaluation.answers.job import WorkerPart
from evaluation.errors import DeviceError, WorkerError
from tests.evaluation.conftest import workers

Holder = subprocess.Popen[str]


def journals(cache: Path) -> list[list[str]]:
    """Return the keys of the chunks in each worker's journal."""
    return [
        [json.loads(line)["chunk"] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for path in sorted(cache.glob("plus-*/journal*.jsonl"))
    ]


@pytest.mark.slow
def test_a_report_of_several_workers_is_that_of_one_and_a_killed_one_costs_its_chunk_alone(
    model: Path, benchmark: Path, tmp_path: Path
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    alone = evaluate(model, [benchmark], cache=one, batch_size=2)[0].report
    (whole,) = journals(one)
    (first,) = one.glob("plus-*")
    second = several / first.name
    second.mkdir(parents=True)
    # What the second worker has done before it is killed.
    lines = (first / "journal.jsonl").read_text().splitlines(keepends=True)
    (second / "journal-1.jsonl").write_text(lines[1] + lines[3][:-9])
    seen: list[Progress] = []

    def kill(progress: Progress) -> None:
        if not seen:
            alive = workers(psutil.Process())
            assert len(alive) == 2
            max(alive, key=lambda each: each.pid).send_signal(signal.SIGKILL)
        seen.append(progress)

    with (
        FileLock(second / "lock-1"),
        pytest.raises(WorkerError, match="was killed by SIGKILL; finished answers are kept, evaluate again"),
    ):
        evaluate(model, [benchmark], cache=several, batch_size=2, device="cpu,cpu", on_progress=kill)
    # The first goes on and finishes its own.
    assert sorted(journals(several)) == sorted([whole[::2], whole[1:2]])
    assert not list(several.rglob("report*.json"))

    (evaluated,) = evaluate(model, [benchmark], cache=several, batch_size=2, device="cpu,cpu,cpu", on_progress=kill)
    merged = evaluated.report
    assert (seen[-1].done, seen[-1].total) == (12, 12)
    everything = [key for keys in journals(several) for key in keys]
    assert sorted(everything) == sorted(whole)
    assert len(everything) == len(set(everything))
    assert merged.to_json() == replace(alone, seconds=merged.seconds).to_json()
    assert (first / "samples.jsonl").read_bytes() == (second / "samples.jsonl").read_bytes()
    ours, theirs = (json.loads((path / "results.json").read_text()) for path in (first, second))
    assert ours["results"] == theirs["results"]
    assert ours["config"] == theirs["config"]


@pytest.mark.parametrize("of", [1, 2, 3, 7])
def test_every_chunk_has_one_worker(of: int) -> None:
    for chunk in range(20):
        assert [WorkerPart(index, of).holds(chunk) for index in range(of)].count(True) == 1


def test_devices_are_dealt_out_to_workers_as_many_as_an_engine_spans() -> None:
    two = Backend("vllm", tensor_parallel_size=2)
    assert worker_devices("cpu", Backend()) == ["cpu"]
    assert worker_devices("cuda:1,cuda:0", Backend()) == ["cuda:1", "cuda:0"]
    assert worker_devices("cuda:0,cuda:1,cuda:4,cuda:5", two) == ["cuda:0,cuda:1", "cuda:4,cuda:5"]


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device is gpu and must be cpu, cuda or cuda:N, or several of a kind"),
        ("cuda:0,", "device is cuda:0, and must be"),
        ("cpu,cuda:0", "device is cpu,cuda:0 and must be"),
        ("cuda,cuda:0", "device cuda,cuda:0 names a GPU twice: one worker fills it"),
    ],
)
def test_devices_that_are_none_are_refused(device: str, message: str) -> None:
    with pytest.raises(DeviceError, match=message):
        worker_devices(device, Backend())


def test_a_worker_sees_its_own_gpus_among_those_that_its_parent_sees() -> None:
    assert mask("cuda", {}) == "0"
    assert mask("cuda:1,cuda:3", {}) == "1,3"
    assert mask("cuda:1", {"CUDA_VISIBLE_DEVICES": "4,GPU-5a"}) == "GPU-5a"


HOLD = """
import sys
from pathlib import Path
from evaluation.answers.devices import occupied
def say(*words):
    print(*words, flush=True)
device, evaluations, directory = sys.argv[1:]
limit = {"evaluations": int(evaluations)} if evaluations else {}
with occupied(device, {}, on_wait=lambda place: say("waits for", place), directory=Path(directory), **limit):
    say("in")
    sys.stdin.read()
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[..., Holder]]:
    """Start a process that holds a place on a device; what it says is read a line at a time."""
    started: list[Holder] = []

    def start(device: str, evaluations: int | str = "") -> Holder:
        argv = [sys.executable, "-c", HOLD, device, str(evaluations), str(tmp_path)]
        started.append(subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for holder in started:
        holder.kill()
        holder.communicate()


def says(holder: Holder) -> str:
    """Return the next line of a holder, once it is there."""
    assert holder.stdout is not None
    return holder.stdout.readline().strip()


@pytest.mark.parametrize(("device", "name"), [("cuda:0", "GPU 0"), ("cpu", "the CPU")])
def test_as_many_evaluations_as_are_allowed_run_at_once_and_a_killed_ones_place_is_taken_at_once(
    hold: Callable[..., Holder], device: str, name: str
) -> None:
    first, second = hold(device, 2), hold(device, 2)
    assert [says(first), says(second)] == ["in", "in"]
    third = hold(device, 2)
    assert says(third) == f"waits for {name}"
    first.kill()
    killed = time.monotonic()
    assert says(third) == "in"
    assert time.monotonic() - killed < 5
    # Another run's limit is its own: it looks at the first places only, or at more.
    alone, wider = hold(device, 1), hold(device, 3)
    assert [says(alone), says(wider)] == [f"waits for {name}", "in"]


def test_a_gpu_is_one_evaluations_unless_more_are_allowed_and_a_cpu_everybodys(
    hold: Callable[..., Holder],
) -> None:
    assert says(hold("cuda:1")) == "in"
    assert says(hold("cuda:1")) == "waits for GPU 1"
    # In one order for everybody: what is free is taken first, by number.
    assert says(hold("cuda:1,cuda:0")) == "waits for GPU 1"
    assert says(hold("cuda:0")) == "waits for GPU 0"
    assert [says(hold("cpu")) for _ in range(2)] == ["in", "in"]


def test_a_gpu_is_known_by_its_own_number_whatever_is_masked(tmp_path: Path) -> None:
    waited: list[str] = []
    inside = threading.Event()

    def second() -> None:
        with occupied("cuda:1", {"CUDA_VISIBLE_DEVICES": "0,2"}, on_wait=waited.append, directory=tmp_path):
            inside.set()

    with occupied("cuda:2,cuda:0", os.environ, on_wait=pytest.fail, directory=tmp_path):
        with occupied("cuda:1", {}, on_wait=pytest.fail, directory=tmp_path):
            pass
        thread = threading.Thread(target=second)
        thread.start()
        assert not inside.wait(0.3)
        assert waited == ["GPU 2"]
    assert inside.wait(10)
    thread.join()
    with occupied("cpu", {}, on_wait=pytest.fail, directory=tmp_path / "absent"):
        pass


@pytest.mark.slow
def test_a_limited_evaluation_waits_says_for_what_and_ends_in_the_same_report(
    model: Path,
    benchmark: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    score = partial(evaluate, model, [benchmark], cache=tmp_path / "cache", batch_size=2)
    with ThreadPoolExecutor() as pool:
        with occupied("cpu", {}, evaluations=1, on_wait=pytest.fail):
            waiting = pool.submit(score, evaluations=1)
            end = time.monotonic() + 240
            while "evaluations" not in caplog.text:
                assert time.monotonic() < end
                time.sleep(0.1)
            assert "the CPU has 1 evaluation at work and may have no more" in caplog.text
            assert not waiting.done()
        (report,) = waiting.result(60)
    # However many are allowed, the evaluation is the same: it is alive again.
    for evaluations in (None, 2):
        assert score(evaluations=evaluations) == [report]
    assert len(list((tmp_path / "cache").iterdir())) == 1
