"""Several workers end in the report of one, and a GPU is one evaluation's at a time."""

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from filelock import FileLock

from evaluation.answers.backend import Backend
from evaluation.answers.devices import mask, occupied, worker_devices
from evaluation.answers.harness import Progress, evaluate
from evaluation.answers.job import Part
from evaluation.errors import DeviceError, WorkerError
from tests.evaluation.conftest import workers


def journals(cache: Path) -> list[list[str]]:
    """Return the keys of the chunks in each worker's journal."""
    return [
        [json.loads(line)["chunk"] for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        for path in sorted(cache.glob("plus-*/journal*.jsonl"))
    ]


def test_a_report_of_several_workers_is_that_of_one_and_a_killed_one_costs_its_chunk_alone(
    model: Path, benchmark: Path, tmp_path: Path
) -> None:
    one, several = tmp_path / "one", tmp_path / "several"
    (alone,) = evaluate(model, [benchmark], cache=one, batch_size=2)
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
            found = workers(psutil.Process())
            assert len(found) == 2
            max(found, key=lambda each: each.pid).send_signal(signal.SIGKILL)
        seen.append(progress)

    with (
        FileLock(second / "lock-1"),
        pytest.raises(WorkerError, match="was killed by SIGKILL; finished answers are kept, evaluate again"),
    ):
        evaluate(model, [benchmark], cache=several, batch_size=2, device="cpu,cpu", on_progress=kill)
    # The first goes on and finishes its own.
    assert sorted(journals(several)) == sorted([whole[::2], whole[1:2]])
    assert not list(several.rglob("report*.json"))

    (merged,) = evaluate(model, [benchmark], cache=several, batch_size=2, device="cpu,cpu,cpu", on_progress=kill)
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
        assert [Part(index, of).holds(chunk) for index in range(of)].count(True) == 1


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


def test_a_gpu_that_another_evaluation_holds_is_waited_for_by_whatever_number_it_is_known(tmp_path: Path) -> None:
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
        assert waited == ["2"]
    assert inside.wait(10)
    thread.join()
    with occupied("cpu", {}, on_wait=pytest.fail, directory=tmp_path / "absent"):
        pass
