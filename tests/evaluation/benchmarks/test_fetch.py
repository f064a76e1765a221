"""Benchmarks brought from a Hub that serves self-written problems in the schema of the real data sets."""

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import datasets
import datasets.config
import huggingface_hub.constants
import pytest
from lm_eval.api.model import LM

from evaluation.answers.job import Assignment
from evaluation.answers.journal import Journal
from evaluation.answers.worker import load_task, score
from evaluation.benchmarks.benchmark import resolve_benchmark
from evaluation.benchmarks.catalog import catalog
from evaluation.benchmarks.data_directory import VARIABLE, read_manifest
from evaluation.benchmarks.fetch import fetch
from evaluation.benchmarks.lm_eval_task import load_any_task
from evaluation.benchmarks.recipe import part_of
from evaluation.benchmarks.task_yaml import SHIPPED, find_task, read_yaml
from evaluation.errors import BenchmarkError
from evaluation.problems import problem_id
from evaluation.prompts import instructed, raw_chat
from tests.helpers import cli
from tests.helpers.hub_server import Hub, serve

if TYPE_CHECKING:
    from evaluation.answers.lm import JournalledLM

MATH = [
    {"problem": "Compute $1+1$.", "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed{2}$."},
    {"problem": "Solve $2x=1$.", "level": "Level 2", "type": "Algebra", "solution": r"So $x=\boxed{\frac{1}{2}}$."},
    {"problem": "Compute  $1+1$.", "level": "Level 1", "type": "Algebra", "solution": r"$2-0=\fbox{2}$"},
    {"problem": "Compute $3^2$.", "level": "Level 1", "type": "Prealgebra", "solution": r"It is $\boxed 9$."},
    {"problem": "Prove it.", "level": "Level 5", "type": "Geometry", "solution": "Clear."},
    *(
        {"problem": f"Compute ${n}+0$.", "level": "Level 1", "type": "Algebra", "solution": rf"$\boxed{{{n}}}$"}
        for n in range(600)
    ),
]
README = """---
configs:
- config_name: {config}
  data_files:
{files}
---
"""


def parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    held = io.BytesIO()
    datasets.Dataset.from_list(list(rows)).to_parquet(held)
    return held.getvalue()


def data_set(config: str = "default", **splits: Sequence[Mapping[str, Any]]) -> dict[str, bytes]:
    """Return the files of a data set as `push_to_hub` lays them out."""
    lines = "\n".join(f"  - split: {split}\n    path: {config}/{split}-*" for split in splits)
    named = {f"{config}/{split}-00000-of-00001.parquet": parquet(rows) for split, rows in splits.items()}
    return {"README.md": README.format(config=config, files=lines).encode(), **named}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with serve() as server:
        for name, files in {
            "TianHongZXY/MATH": data_set(train=MATH[:2], test=MATH),
            "TianHongZXY/AIME2025": data_set(test=[{"problem": "Find $7^2$.", "answer": "049"}]),
            "MathArena/aime_2026": data_set(
                train=[{"problem_idx": 1, "answer": 277, "problem": "Find $277$."}],
            ),
            "MathArena/hmmt_feb_2025": data_set(
                train=[
                    {"problem_idx": 1, "answer": r"\frac{1}{576}", "problem": "Find it.", "problem_type": ["Algebra"]},
                    {"problem_idx": 2, "answer": "103", "problem": "Find\u2028that.", "problem_type": []},
                ]
            ),
            "TianHongZXY/amc23": data_set(test=[{"id": 0, "question": "Find $27$.", "answer": 27.0, "url": "u"}]),
            "zwhe99/simplerl-OlympiadBench": {
                "test.jsonl": (
                    json.dumps({"id": 5, "question": "Find $n$.", "final_answer": ["2", "3"], "unit": None}) + "\n"
                ).encode()
            },
            "openai/gsm8k": data_set(
                "main",
                train=[{"question": f"What is {n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(8)],
                test=[{"question": "What is 3+4?", "answer": "3+4=7\n#### 7"}],
            ),
            "org/pictures": data_set(test=[{"question": "q", "answer": "a", "picture": b"\x89PNG"}]),
        }.items():
            server.make(f"datasets/{name}").commit(files)
        yield server


@pytest.fixture(autouse=True)
def place(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let the Hub's clients ask the server of the test, and benchmarks lie in a directory of the test."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    template = re.sub(r"^https?://[^/]+", hub.url, constants.HUGGINGFACE_CO_URL_TEMPLATE)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "benchmarks"))
    return tmp_path / "benchmarks"


def problems(place: Path, name: str, split: str = "test") -> list[dict[str, Any]]:
    text = (place / name / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.removesuffix("\n").split("\n")]


def test_math_is_fetched_in_one_form_with_the_answers_of_its_boxes(place: Path) -> None:
    manifest = fetch("math")
    kept = problems(place, "math")
    assert kept[:4] == [
        {"id": "test/0", "problem": "Compute $1+1$.", "answer": "2"},
        {"id": "test/1", "problem": "Solve $2x=1$.", "answer": r"\frac{1}{2}"},
        {"id": "test/2", "problem": "Compute  $1+1$.", "answer": "2"},
        {"id": "test/3", "problem": "Compute $3^2$.", "answer": "9"},
    ]
    assert manifest.left_out == ("test/4",)
    assert manifest.splits["test"].problems == len(kept) == len(MATH) - 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("aime_2025", [("test/0", "Find $7^2$.", "049")]),
        ("aime_2026", [("train/0", "Find $277$.", "277")]),
        ("hmmt_feb_2025", [("train/0", "Find it.", r"\frac{1}{576}"), ("train/1", "Find\u2028that.", "103")]),
        ("amc_2023", [("test/0", "Find $27$.", "27")]),
        ("olympiadbench", [("test/0", "Find $n$.", "2")]),
    ],
)
def test_every_other_shipped_benchmark_reads_its_data_set_as_it_is(
    place: Path, name: str, expected: list[tuple[str, str, str]]
) -> None:
    fetch(name)
    assert [(each["id"], each["problem"], each["answer"]) for each in problems(place, name)] == expected
    assert resolve_benchmark(name).generation == {
        "max_new_tokens": 4096,
        "temperature": 0.7,
        "top_p": 0.8,
        "samples": 8,
    }


def test_selection_and_gate_are_the_whole_and_share_no_problem(place: Path) -> None:
    for name in ("math", "math_select", "math_gate"):
        fetch(name)
    whole, select, gate = (problems(place, name) for name in ("math", "math_select", "math_gate"))

    def texts(part: list[dict[str, Any]]) -> set[str]:
        return {" ".join(each["problem"].split()) for each in part}

    assert len(texts(select)) == len(select) == 500
    assert texts(select).isdisjoint(texts(gate))
    assert texts(select + gate) == texts(whole)
    # The same text as test/0.
    twice = [each for each in whole if each["id"] in {"test/2"}]
    assert sorted(map(str, select + gate + twice)) == sorted(map(str, whole))


def test_a_part_depends_on_the_texts_alone() -> None:
    rows = [{"id": str(n), "problem": f"Problem  {n % 40}"} for n in range(50)]
    least = part_of(rows, "least", 10)
    other = [{"id": "x", "problem": row["problem"].upper().replace("  ", "\n")} for row in reversed(rows)]
    again = part_of(other, "least", 10)
    assert {row["problem"].casefold().split()[1] for row in least} == {row["problem"].split()[1] for row in again}
    assert len(least) == 10
    assert part_of(rows, "rest", 10) == [row for row in rows[:40] if row not in least]


def test_what_is_there_needs_no_hub(hub: Hub, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fetch("aime_2026")
    asked = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert fetch("aime_2026") == first
    assert resolve_benchmark("aime_2026").name == "aime_2026"
    assert len(hub.requests) == asked


def test_without_a_hub_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        BenchmarkError, match=r"MathArena/aime_2026 at main cannot be fetched: .* copy .*benchmarks from"
    ):
        fetch("aime_2026")


def test_a_manifest_brings_the_same_commit_after_the_branch_has_moved(hub: Hub, place: Path) -> None:
    before = fetch("hmmt_feb_2025")
    repository = hub.repositories["datasets/MathArena/hmmt_feb_2025"]
    kept = repository.commits[repository.branches["main"]]
    repository.commit(data_set(train=[{"problem_idx": 1, "answer": "9", "problem": "Changed.", "problem_type": []}]))
    try:
        data = (place / "hmmt_feb_2025" / "test.jsonl").read_bytes()
        (place / "hmmt_feb_2025" / "test.jsonl").unlink()
        assert fetch("hmmt_feb_2025") == before
        assert (place / "hmmt_feb_2025" / "test.jsonl").read_bytes() == data
    finally:
        repository.commit(kept)


def test_parts_of_one_data_set_are_of_one_commit(hub: Hub) -> None:
    select = fetch("math_select")
    repository = hub.repositories["datasets/TianHongZXY/MATH"]
    kept = repository.commits[repository.branches["main"]]
    repository.commit(data_set(train=MATH[:2], test=MATH[:3]))
    try:
        assert fetch("math_gate").commit == select.commit
    finally:
        repository.commit(kept)


def test_data_that_a_commit_no_longer_gives_is_refused_with_both_digests(place: Path) -> None:
    fetch("aime_2025")
    path = place / "aime_2025" / "manifest.json"
    path.write_text(re.sub(r'"sha256": "\w+"', f'"sha256": "{"0" * 64}"', path.read_text()))
    with pytest.raises(
        BenchmarkError, match=r"gives test\.jsonl sha256 [1-9a-f]\w{63} and .* says test\.jsonl sha256 0{64}"
    ):
        fetch("aime_2025")


def test_changed_data_is_noticed_before_it_is_used(place: Path) -> None:
    fetch("aime_2025")
    data = place / "aime_2025" / "test.jsonl"
    data.write_text(data.read_text().replace("049", "050"))
    with pytest.raises(BenchmarkError, match=r"test\.jsonl has sha256"):
        resolve_benchmark("aime_2025")
    fetch("aime_2025")
    resolve_benchmark("aime_2025")


def test_what_has_not_been_fetched_says_how_to(place: Path) -> None:
    for name in ("math", "gsm8k"):
        with pytest.raises(BenchmarkError, match=f"{name} .*not been fetched: run relex benchmarks fetch {name}"):
            resolve_benchmark(name)
    assert not place.exists()


def test_a_digest_is_of_the_data_and_not_of_its_place(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("aime_2025")
    here = resolve_benchmark("aime_2025")
    place.rename(tmp_path / "moved")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "moved"))
    there = resolve_benchmark("aime_2025")
    assert here.digest == there.digest
    assert here.path != there.path


def test_a_task_of_lm_eval_is_fetched_by_name_and_loads_with_its_own_metric(place: Path) -> None:
    manifest = fetch("gsm8k")
    assert {split: entry.problems for split, entry in manifest.splits.items()} == {"test": 1, "train": 8}
    resolved = resolve_benchmark("gsm8k")
    task = load_any_task("gsm8k", str(resolved.path))
    assert [*task.aggregation()] == ["exact_match"]
    (problem,) = task.eval_docs
    assert task.doc_to_text(problem) == "Question: What is 3+4?\nAnswer:"
    assert len([*task.fewshot_docs()]) == 8
    changed = resolved.path.with_name("test.jsonl")
    changed.write_text(changed.read_text().replace("7", "8"))
    with pytest.raises(BenchmarkError, match=r"test\.jsonl has sha256"):
        load_any_task("gsm8k", str(resolved.path))


def test_a_task_of_an_include_path_comes_before_lm_evals_own(place: Path, tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    mine = tmp_path / "tasks" / "whatever.yaml"
    mine.write_text("task: gsm8k  # mine\ndataset_path: MathArena/aime_2026\ntest_split: train\n")
    manifest = fetch("gsm8k", include=[tmp_path / "tasks"])
    assert manifest.task == str(mine)
    assert problems(place, "gsm8k", "train") == [{"problem_idx": 1, "answer": 277, "problem": "Find $277$."}]
    assert resolve_benchmark("gsm8k").name == "gsm8k"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dataset_path: org/none\ntest_split: test", "org/none at main cannot be fetched"),
        ("dataset_path: json\ndataset_kwargs: {data_files: x}\ntest_split: test", "reads data of its own, json"),
        ("custom_dataset: x\ndataset_path: a/b\ntest_split: test", "names no single data set of the Hub"),
        (
            "dataset_path: openai/gsm8k\ndataset_name: main\ntest_split: dev",
            "has splits none of those that are read",
        ),
        ("dataset_path: org/pictures\ntest_split: test", "is no text alone, .*bytes"),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_one_line(place: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "odd.yaml").write_text(f"task: odd\n{text}\n")
    with pytest.raises(BenchmarkError, match=message) as refusal:
        fetch("odd", include=[tmp_path / "tasks"])
    assert "\n" not in str(refusal.value)
    assert read_manifest("odd") is None


@pytest.mark.parametrize(("name", "message"), [("../odd", "is no name"), ("nonsense", "no task of lm-eval")])
def test_a_name_that_is_none_is_refused(name: str, message: str, place: Path) -> None:
    with pytest.raises(BenchmarkError, match=message):
        fetch(name)
    assert not place.exists()


@pytest.mark.parametrize("name", ["gsm8k", "ifeval", "leaderboard_ifeval", "minerva_math_algebra"])
def test_a_task_of_lm_eval_is_found_whatever_its_file_is_called(name: str) -> None:
    path = find_task(name)
    assert path is not None
    assert read_yaml(path)["task"] == name


def test_the_catalog_has_every_shipped_benchmark_and_what_was_fetched_besides(place: Path) -> None:
    bases = {"boxed_math", "exact_match", "paper_greedy", "paper_sampled"}
    before = {entry.name: entry for entry in catalog()}
    assert {*before} == {path.stem for path in SHIPPED.glob("*.yaml")} - bases
    assert (before["math"].problems, before["math"].directory) == (5000, "")
    fetch("math")
    fetch("gsm8k")
    after = {entry.name: entry for entry in catalog()}
    assert after["math"].problems == len(MATH) - 1
    assert after["math"].directory == str(place / "math")
    assert after["math"].left_out == 1
    assert (after["gsm8k"].problems, after["gsm8k"].measures) == (1, "lm-eval task, exact_match")


def test_the_prompt_is_the_papers_raw_chat_format() -> None:
    problem = {"problem": "Compute $1+1$.", "answer": "2"}
    assert raw_chat(problem) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nCompute $1+1$.\n"
        "Please reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert instructed(problem) in raw_chat(problem)


class Scripted(LM):  # type: ignore[misc]  # lm_eval carries no types
    """Answers every other request with the right box; cuts the last one off."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.truncated: list[bool] = []

    def generate_until(self, requests: list[Any]) -> list[str]:
        self.asked = [request.args[0] for request in requests]
        self.truncated = [number == len(requests) - 1 for number in range(len(requests))]
        return [r"so \boxed{103}" if number % 2 else "hmm " * 200 for number in range(len(requests))]

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError


def test_eight_samples_become_one_score_a_problem_and_a_chance_of_passing(place: Path, tmp_path: Path) -> None:
    fetch("hmmt_feb_2025")
    resolved = resolve_benchmark("hmmt_feb_2025")
    assignment = Assignment(
        resolved.name, str(resolved.path), resolved.digest, "model", resolved.generation, str(place)
    )
    lm = Scripted()
    with Journal(tmp_path / "journal.jsonl") as journal:
        report, _ = score(
            cast("JournalledLM", lm),
            load_task(assignment),
            assignment=assignment,
            model="model",
            limit=None,
            journal=journal,
        )
    kept = problems(place, "hmmt_feb_2025")
    assert lm.asked == [raw_chat(each) for each in kept for _ in range(8)]
    assert report.metric == "correct"
    assert [value for _, value in report.scores] == [0.0, 0.5]
    assert report.rates == {
        "boxed": 0.5,
        "repeated": 0.5,
        "pass@2": pytest.approx((1 - 6 / 28) / 2),
        "pass@4": pytest.approx((1 - 1 / 70) / 2),
        "pass@8": 0.5,
        "truncated": 1 / 16,
    }


def test_a_shipped_benchmark_loads_in_lm_eval_and_asks_the_papers_prompt(place: Path) -> None:
    for name in ("math", "aime_2026"):
        fetch(name)
        task = load_any_task(name, str(resolve_benchmark(name).path))
        asked = [problem_id(each) for each in task.eval_docs]
        assert asked == sorted(asked)
        problem = next(each for each in task.eval_docs if each["id"].endswith("/0"))
        assert task.doc_to_text(problem) == raw_chat(problem)
        assert next(iter(task.aggregation())) == "correct"
        answers = [r"\boxed{277}", "no"] * (task.config.repeats // 2) or [r"\boxed{2}"]
        scored = task.process_results(problem, [answers])
        assert {*scored} == {*task.aggregation()}
        assert scored["correct"] == (0.5 if task.config.repeats == 8 else 1.0)


def test_a_benchmark_is_asked_in_the_models_own_template_under_another_name(place: Path) -> None:
    for name in ("aime_2026", "gsm8k"):
        fetch(name)
    raw, chat = resolve_benchmark("aime_2026"), resolve_benchmark("aime_2026@chat")
    assert (raw.name, chat.name) == ("aime_2026", "aime_2026@chat")
    assert raw.digest != chat.digest
    assert raw.generation == chat.generation
    task = load_any_task(chat.name, str(chat.path))
    problem = next(iter(task.eval_docs))
    assert task.doc_to_text(problem) == instructed(problem)
    assert task.config.metadata["chat_template"] is True
    assert "chat_template" not in load_any_task(raw.name, str(raw.path)).config.metadata
    foreign = load_any_task("gsm8k@chat", str(resolve_benchmark("gsm8k@chat").path))
    assert foreign.doc_to_text(next(iter(foreign.eval_docs))) == "Question: What is 3+4?\nAnswer:"
    assert foreign.config.metadata["version"] == 3.0
    with pytest.raises(BenchmarkError, match="math has not been fetched"):
        resolve_benchmark("math@chat")


def test_the_command_fetches_lists_and_refuses(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    relex = partial(cli.relex, capsys, "benchmarks")

    status, out, _ = relex("fetch", "math_select", "gsm8k", "--json")
    assert status == 0
    assert [(each["name"], each["problems"], each["left_out"]) for each in json.loads(out)] == [
        ("math_select", 500, 1),
        ("gsm8k", 1, 0),
    ]
    status, out, _ = relex()
    lines = {line.split()[0]: line for line in out.splitlines() if line.split()}
    assert status == 0
    assert fetch("gsm8k").commit[:7] in lines["gsm8k"]
    assert lines["aime_2025"].split()[-1] == "no"
    assert f"fetched benchmarks lie in {place}" in out
    assert "warning: 1 rows of TianHongZXY/MATH have no answer to grade by and are not in math_select" in out
    status, _, err = relex("fetch", "nonsense")
    assert (status, len(err.splitlines())) == (1, 1)
    assert "BenchmarkError: nonsense is not shipped and no task of lm-eval" in err
