"""The vLLM backend, before a stand-in of vLLM that has its interface and a real model (stand_in/vllm)."""

import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.answers import vllm_engine
from evaluation.answers.backend import Backend, parse_backend
from evaluation.answers.fingerprint import LogitsExtrapolation
from evaluation.answers.harness import Progress, evaluate
from evaluation.answers.job import Assignment
from evaluation.answers.journal import Journal
from evaluation.answers.lm import JournalledLM
from evaluation.answers.worker import load_task, score
from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from evaluation.child import HandedBack
from evaluation.errors import BackendError, BenchmarkError, DeviceError, EvaluationError, ModelError, WorkerError
from evaluation.verdict.report import Report
from tests.evaluation.conftest import workers

STAND_IN = Path(__file__).parent / "stand_in"
SAMPLED = "do_sample: true\n  temperature: 1.0\n  top_p: 0.9\n  until: []\nrepeats: 3"
GREEDY = "do_sample: false\n  temperature: 0.0\n  until: []"


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Put the stand-in on the path, of children too, and return the file where it says what it was asked for."""
    monkeypatch.syspath_prepend(str(STAND_IN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(STAND_IN), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "vllm.log"))
    for name in ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_NO_USAGE_STATS"):
        monkeypatch.setenv(name, "unset")
    yield tmp_path / "vllm.log"
    vllm_engine._asleep.clear()
    for name in ("vllm", "vllm.platforms"):
        sys.modules.pop(name, None)


def engine(
    model: Path, *, batch_size: int = 5, device: str = "cpu", max_length: int | None = None, kept: bool = False
) -> JournalledLM:
    from evaluation.answers.vllm_engine import EngineLM

    return EngineLM(
        model,
        device=device,
        dtype="float32",
        batch_size=batch_size,
        max_length=max_length,
        backend=Backend("vllm"),
        digest=str(model),
        kept=kept,
    )


def run(lm: JournalledLM, path: Path, journal: Path) -> Report:
    benchmark = resolve_benchmark(path)
    wanted = Assignment(benchmark.name, str(benchmark.path), benchmark.digest, "m", {}, "unused")
    with Journal(journal) as kept:
        lm.keep(kept, lambda done, total: None)
        return score(lm, load_task(wanted), assignment=wanted, model="m", limit=None, journal=kept)[0]


def answers(journal: Path) -> list[Any]:
    return [answer for line in journal.read_text().splitlines() for answer in json.loads(line)["answers"]]


def events(log: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in map(json.loads, log.read_text().splitlines()) if event["event"] == kind]


@pytest.mark.usefixtures("vllm")
@pytest.mark.parametrize("until", ["[]", "['77', '']", "['<eos>']"])
def test_greedy_answers_and_their_ends_are_those_of_transformers(
    model: Path, edited: Callable[[str, str], Path], tmp_path: Path, until: str
) -> None:
    path = edited("until: []", f"until: {until}")
    expected = run(JournalledLM(model, device="cpu", dtype="float32", batch_size=5), path, tmp_path / "hf")
    lm = engine(model)
    assert run(lm, path, tmp_path / "vllm") == expected
    assert answers(tmp_path / "vllm") == answers(tmp_path / "hf")
    assert 0 < expected.rates["truncated"] < 1
    assert lm.spent.answers == 12
    assert lm.spent.tokens > 12


def test_sampled_answers_depend_on_their_chunk_alone_and_repeats_differ(
    model: Path, edited: Callable[[str, str], Path], tmp_path: Path, vllm: Path
) -> None:
    path = edited(GREEDY, SAMPLED)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    report = run(engine(model), path, whole)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 8  # 36 answers, 5 at once
    cut.write_text("".join(lines[:2] + lines[5:7]) + lines[7][:-9])
    torch.manual_seed(7)
    assert run(engine(model), path, cut) == report
    assert sorted(map(str, answers(cut))) == sorted(map(str, answers(whole)))
    assert len(set(map(str, answers(whole)[:3]))) == 3
    assert [len(event["limits"]) for event in events(vllm, "generate")] == [5] * 7 + [1] + [5] * 3 + [1]


def test_likelihoods_are_those_of_transformers(
    model: Path, edited: Callable[[str, str], Path], vllm: Path, tmp_path: Path
) -> None:
    path = edited("output_type: generate_until", "output_type: multiple_choice\ndoc_to_choice: ['12', '34', '56']")
    text = path.read_text().replace("doc_to_target: answer", "doc_to_target: 0\ntarget_delimiter: ''")
    text = text[: text.index("filter_list")]
    text = re.sub(r"generation_kwargs:\n(  .*\n)+", "", text)
    path.write_text(text + "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n")
    expected = run(JournalledLM(model, device="cpu", dtype="float32", batch_size=5), path, tmp_path / "hf")
    assert run(engine(model), path, tmp_path / "vllm") == expected
    for mine, other in zip(answers(tmp_path / "vllm"), answers(tmp_path / "hf"), strict=True):
        assert mine == [pytest.approx(other[0], abs=1e-4), other[1]]
    assert 0 < expected.accuracy < 1


def test_an_answer_ends_where_the_context_does_if_the_benchmark_says_so(
    model: Path, vllm: Path, tmp_path: Path
) -> None:
    problems = [{"prompt": "1" * length, "answer": "2"} for length in (3, 15, 20)]
    path = write_benchmark(tmp_path, "long", problems, max_new_tokens=200)
    with pytest.raises(BenchmarkError, match="problem 0 of long has 4 tokens and may generate 200, more than the 24"):
        run(engine(model, max_length=24), path, tmp_path / "refused")
    path.write_text(path.read_text().replace("  do_sample: false", "  do_sample: false\n  cut_to_context: true"))
    lm = engine(model, max_length=24)
    run(lm, path, tmp_path / "cut")
    # All three are answered at once, each with its own room.
    assert [event["limits"] for event in events(vllm, "generate")] == [[20, 8, 3]]
    assert lm.truncated[2]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("temperature: 0.0", "temperature: 0.0\n  seed: 1234", "plus gives seed 1234, and all samples of a problem"),
        ("temperature: 0.0", "temperature: 0.0\n  num_beams: 4", "vLLM cannot decode plus by .*num_beams"),
        ("do_sample: false", "do_sample: true\n  top_p: 3", r"vLLM cannot decode plus by .*top_p must be in \(0, 1\]"),
    ],
)
def test_a_decoding_that_vllm_cannot_do_is_refused_before_the_engine_starts(
    model: Path, edited: Callable[[str, str], Path], vllm: Path, tmp_path: Path, *, old: str, new: str, message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        run(engine(model), edited(old, new), tmp_path / "journal")
    assert not vllm.exists()


@pytest.mark.usefixtures("vllm")
def test_an_engine_that_does_not_start_or_gives_up_is_an_error_of_one_line(
    model: Path, benchmark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match="device is cuda and this vLLM runs on cpu: pass that as device"):
        run(engine(model, device="cuda"), benchmark, tmp_path / "journal")
    with monkeypatch.context() as patch:
        patch.setenv("STAND_IN_LOADING", "fails")
        with pytest.raises(ModelError, match=r"vLLM cannot load .*: No available memory for the cache blocks"):
            run(engine(model), benchmark, tmp_path / "journal")
    monkeypatch.setenv("STAND_IN_ABORTS", "yes")
    with pytest.raises(WorkerError, match="vLLM ended an answer by abort: evaluate again"):
        run(engine(model), benchmark, tmp_path / "journal")
    assert (tmp_path / "journal").read_bytes() == b""


def test_a_kept_engine_sleeps_between_models_and_answers_for_each_with_its_own_weights(
    model: Path, other_model: Path, edited: Callable[[str, str], Path], vllm: Path, tmp_path: Path
) -> None:
    path = edited("max_gen_toks: 40", "max_gen_toks: 4")
    for number, each in enumerate((model, other_model, other_model, model)):
        lm = engine(each, kept=True, batch_size=12)
        run(lm, path, tmp_path / str(number))
        lm.release()
    for each, numbers in ((model, "03"), (other_model, "12")):
        run(JournalledLM(each, device="cpu", dtype="float32", batch_size=12), path, tmp_path / each.name)
        for name in numbers:
            assert answers(tmp_path / name) == answers(tmp_path / each.name)
    # What journals hold wakes nothing.
    idle = engine(other_model, kept=True, batch_size=12)
    run(idle, path, tmp_path / "1")
    idle.release()
    assert answers(tmp_path / "0") != answers(tmp_path / "1")
    assert [event["arguments"]["enable_sleep_mode"] for event in events(vllm, "start")] == [True]
    assert [event["level"] for event in events(vllm, "sleep")] == [2] * 4
    assert [event["path"] for event in events(vllm, "reload")] == [str(other_model)] * 2 + [str(model)]


@pytest.mark.parametrize("how", ["stale", "empty", "unsupported", "other shape", "other length"])
def test_weights_that_are_not_those_of_the_model_send_it_to_another_process(
    model: Path,
    other_model: Path,
    benchmark: Path,
    vllm: Path,
    tmp_path: Path,
    *,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = engine(model, kept=True)
    run(first, benchmark, tmp_path / "first")
    first.release()
    monkeypatch.setenv("STAND_IN_RELOAD", how)
    second = Path(shutil.copytree(other_model, tmp_path / "second"))
    if how == "other shape":
        config = json.loads((second / "config.json").read_text())
        (second / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(HandedBack):
        run(
            engine(second, kept=True, max_length=60 if how == "other length" else None), benchmark, tmp_path / "answers"
        )
    assert (tmp_path / "answers").read_bytes() == b""


def test_a_stale_engine_is_told_from_a_model_that_hardly_differs(
    model: Path, benchmark: Path, vllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = Path(shutil.copytree(model, tmp_path / "near"))
    weights = load_file(near / "model.safetensors")
    name = next(name for name in weights if "down_proj" in name)
    weights[name] = weights[name] * 1.0001
    save_file(weights, near / "model.safetensors", metadata={"format": "pt"})
    first = engine(model, kept=True)
    run(first, benchmark, tmp_path / "first")
    first.release()
    second = engine(near, kept=True)
    run(second, benchmark, tmp_path / "own")
    second.release()
    monkeypatch.setenv("STAND_IN_RELOAD", "stale")
    with pytest.raises(HandedBack):
        run(engine(model, kept=True), benchmark, tmp_path / "stale")


@pytest.mark.slow
def test_a_killed_engine_resumes_in_a_child_and_ends_in_the_report_of_two(
    model: Path, benchmark: Path, vllm: Path, tmp_path: Path
) -> None:
    def kill(progress: Progress) -> None:
        (worker,) = workers(psutil.Process())
        worker.send_signal(signal.SIGKILL)

    backend = "vllm:gpu_memory_utilization=0.5"
    with pytest.raises(WorkerError, match="was killed by SIGKILL; finished answers are kept"):
        evaluate(model, [benchmark], cache=tmp_path / "cache", batch_size=3, backend=backend, on_progress=kill)
    (journal,) = (tmp_path / "cache").glob("plus-*/journal.jsonl")
    kept = journal.read_text()
    assert kept
    # Two engines go on from what one has answered.
    (evaluated,) = evaluate(
        model, [benchmark], cache=tmp_path / "cache", batch_size=3, backend=backend, device="cpu,cpu"
    )
    report = evaluated.report
    assert journal.read_text().startswith(kept)
    lines = [line for path in journal.parent.glob("journal*.jsonl") for line in path.read_text().splitlines()]
    assert len(lines) == 4
    assert report.accuracy == pytest.approx(1 / 3)
    settings = {"backend": "vllm", "vllm version": "0.28.0", "tensor_parallel_size": 1, "max_model_len": None}
    assert settings.items() <= report.settings.items()
    assert "gpu_memory_utilization" not in report.settings
    started = events(vllm, "start")
    assert all(event["in_process"] for event in started)
    assert started[0]["arguments"] == {
        "dtype": "float32",
        "generation_config": "vllm",
        "load_format": "safetensors",
        "max_model_len": 64,
        "max_num_seqs": 3,
        "tensor_parallel_size": 1,
    }
    (results,) = journal.parent.glob("results.json")
    assert json.loads(results.read_text())["config"]["model"] == "vllm"


def test_what_is_asked_of_vllm_is_checked_before_a_child_starts(model: Path, benchmark: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(BackendError, match="vLLM is not installed: pip install vllm, or pass hf"):
        evaluate(model, [benchmark], cache=cache, backend="vllm")
    with pytest.raises(BackendError, match="backend vllm does not decode two models in lock-step: pass hf"):
        evaluate(LogitsExtrapolation(model, model, 2.0), [benchmark], cache=cache, backend="vllm")
    with pytest.raises(DeviceError, match="names 3 and an engine of the backend spans 2: name a multiple of 2"):
        evaluate(model, [benchmark], cache=cache, device="cuda:0,cuda:1,cuda:2", backend="vllm:tensor_parallel_size=2")
    assert not cache.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tgi", "backend is tgi and must be one of hf, vllm"),
        ("hf:tensor_parallel_size=2", "backend hf has no parameter tensor_parallel_size: it has share_device"),
        ("vllm:tensor_parallel_size=0", "tensor_parallel_size is 0 and must be a whole number above 0"),
        ("vllm:max_model_len=long", "max_model_len is long and must be a whole number above 0"),
        ("vllm:gpu_memory_utilization=1.5", r"gpu_memory_utilization is 1.5 and must be a share in 0\.\.1"),
        ("vllm:share_device=perhaps", "share_device is perhaps and must be true or false"),
        ("vllm:max_model_len", "max_model_len is  and must be a whole number"),
    ],
)
def test_a_backend_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        parse_backend(text)


def test_a_backend_is_a_name_and_parameters() -> None:
    assert parse_backend("hf") == Backend()
    text = "vllm:tensor_parallel_size=2,gpu_memory_utilization=0.8,max_model_len=4096,share_device=true"
    assert parse_backend(text) == Backend("vllm", True, 2, 0.8, 4096)
