"""What is left in a worker between two jobs: nothing that a score, a device or a later model could see."""

import gc
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from evaluation.answers import worker
from evaluation.answers.fingerprint import LogitsExtrapolation
from evaluation.answers.harness import Progress, evaluate
from evaluation.answers.job import Assignment, Job
from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from evaluation.child import kept_children
from evaluation.errors import BenchmarkError, DeviceError
from tests.evaluation.conftest import workers, written

MARKS = """
from evaluation.grading import score_boxed_math
ANSWERS = [r"\\\\boxed{\\\\frac{2}{4}}", r"\\\\boxed{x^2-1}", "none"]
def score(problem, results):
    return score_boxed_math(problem, [ANSWERS[len(problem["prompt"]) % 3]])
"""


def wanted(path: Path, cache: Path) -> Assignment:
    benchmark = resolve_benchmark(path)
    assignment = Assignment(benchmark.name, str(benchmark.path), benchmark.digest, "m", {}, str(cache))
    assignment.directory.mkdir(parents=True)
    return assignment


@pytest.mark.parametrize("end", ["scored", "refused", "two models"])
def test_no_model_is_left_when_its_place_is_given_up(
    model: Path, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, end: str
) -> None:
    loaded: list[weakref.ref[Any]] = []
    left: list[bool] = []
    load = worker._load_lm

    def loading(job: Job, *, kept: bool) -> Any:
        lm = load(job, kept=kept)
        loaded.extend(weakref.ref(each) for each in (lm, lm.model, next(lm.model.parameters())))
        return lm

    class Place(nullcontext[None]):
        def __exit__(self, *_: object) -> None:
            left.extend(each() is not None for each in loaded)

    monkeypatch.setattr(worker, "_load_lm", loading)
    monkeypatch.setattr(worker, "_place", lambda *_: Place())
    prompt = "1" * (70 if end == "refused" else 3)
    path = write_benchmark(tmp_path, "plus", [{"prompt": prompt, "answer": "2"}], max_new_tokens=4)
    subject = LogitsExtrapolation(model, other_model, 2.0) if end == "two models" else model
    job = Job(subject, "cpu", "float32", batch_size=1, limit=None, assignments=(wanted(path, tmp_path / "cache"),))
    with pytest.raises(BenchmarkError, match="problem 0 of plus") if end == "refused" else nullcontext():
        worker.run(job, lambda _: None)
    assert left == [False] * 3
    gc.unfreeze()


def test_a_worker_sees_its_gpus_by_the_numbers_of_the_machine_in_every_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(worker, "ENVIRONMENT", {"CUDA_VISIBLE_DEVICES": "4,5"})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    worker._see_only.cache_clear()
    with pytest.raises(DeviceError, match="device cuda:2 was asked for and this machine has 2 CUDA devices"):
        worker._see_only("cuda:2")
    for count in (2, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        worker._see_only("cuda:1")
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    worker._see_only.cache_clear()


@pytest.mark.slow
def test_every_kind_of_job_ends_in_the_same_bytes_in_whatever_order_one_child_does_them(
    model: Path, other_model: Path, edited: Callable[[str, str], Path], tmp_path: Path
) -> None:
    sampled = edited(
        "do_sample: false\n  temperature: 0.0\n  until: []",
        "do_sample: true\n  temperature: 1.0\n  until: []\nrepeats: 3",
    )
    problems = [{"prompt": "1" * length, "answer": r"\frac{1}{2}"} for length in range(1, 7)]
    symbolic = write_benchmark(tmp_path / "symbolic", "symbolic", problems, max_new_tokens=4, base="boxed_math")
    symbolic.with_name("marks.py").write_text(MARKS.replace("\\\\", "\\"))
    text = symbolic.read_text()
    symbolic.write_text(f"{text}process_results: !function marks.score\n")
    chat = write_benchmark(tmp_path / "chat", "chat", problems, max_new_tokens=8)
    chat.write_text(chat.read_text() + "metadata: {chat_template: true}\n")
    templated = Path(shutil.copytree(model, tmp_path / "templated"))
    (templated / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0]['content'] }}=")
    jobs: list[tuple[Path | LogitsExtrapolation, list[Path]]] = [
        (model, [sampled]),
        (templated, [chat, symbolic]),
        (LogitsExtrapolation(other_model, model, 2.0), [sampled]),
        (other_model, [symbolic, sampled]),
    ]
    seen: set[int] = set()

    def note(_: Progress) -> None:
        seen.update(child.pid for child in workers(psutil.Process()))

    def run(name: str, order: list[int]) -> dict[int, list[dict[str, Any]]]:
        return {
            number: [
                written(each.results.parent)
                for each in evaluate(*jobs[number], cache=tmp_path / name, batch_size=4, on_progress=note)
            ]
            for number in order
        }

    alone = run("alone", [0, 1, 2, 3])
    assert len(seen) == 4
    seen.clear()
    with kept_children():
        assert run("kept", [0, 1, 2, 3]) == alone
        assert run("again", [3, 1, 0, 2]) == alone
        assert len(seen) == 1
        (shared,) = evaluate(model, [sampled], cache=tmp_path / "shared", batch_size=4, device="cpu,cpu")
        assert written(shared.results.parent) == alone[0][0]
    assert len({each[-1]["samples"] for each in alone.values()}) == 4
    assert {score for _, score in alone[1][1]["report"]["scores"]} == {0.0, 1.0}
