"""What one process does with one model, without a child around it."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen2ForCausalLM

from evaluation.answers.job import Assignment
from evaluation.answers.journal import Journal
from evaluation.answers.lm import JournalledLM
from evaluation.answers.worker import load_task, score
from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from evaluation.errors import BenchmarkError, ModelError
from evaluation.problems import problem_id
from evaluation.verdict.report import Report


@pytest.fixture(scope="module")
def lm(model: Path) -> JournalledLM:
    return JournalledLM(model, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    with Journal(tmp_path / "journal.jsonl") as journal:
        yield journal


def assignment(path: Path) -> Assignment:
    benchmark = resolve_benchmark(path)
    return Assignment(
        benchmark=benchmark.name,
        benchmark_path=str(benchmark.path),
        benchmark_digest=benchmark.digest,
        model_digest="m",
        settings={},
        cache="unused",
    )


def run(lm: JournalledLM, path: Path, journal: Journal, *, limit: int | None = None) -> Report:
    lm.keep(journal, lambda done, total: None)
    wanted = assignment(path)
    return score(lm, load_task(wanted), assignment=wanted, model="/models/m", limit=limit, journal=journal)[0]


def chunks(journal: Path) -> list[list[tuple[str, bool]]]:
    return [json.loads(line)["answers"] for line in journal.read_text().splitlines()]


def test_batched_answers_are_those_of_a_plain_decoder(
    lm: JournalledLM,
    benchmark: Path,
    journal: Journal,
    problems: list[dict[str, str]],
    *,
    ask: Callable[[str], tuple[str, bool]],
    tmp_path: Path,
) -> None:
    # Holds only with the tokenizer's own BOS, padding on the left, and the checkpoint's sampling settings reset.
    report = run(lm, benchmark, journal)
    answers = [answer for chunk in chunks(tmp_path / "journal.jsonl") for answer, _ in chunk]
    assert answers == [ask(problem["prompt"])[0] for problem in problems]
    assert report.scores == tuple((problem_id(each), float(each["answer"] != "no")) for each in problems)
    assert report.accuracy == pytest.approx(1 / 3)
    assert report.metric == "exact_match"


def test_an_answer_is_truncated_unless_it_ended_by_itself_or_at_a_stop(
    lm: JournalledLM,
    edited: Callable[[str, str], Path],
    journal: Journal,
    problems: list[dict[str, str]],
    ask: Callable[[str], tuple[str, bool]],
) -> None:
    plain = [ask(problem["prompt"]) for problem in problems]
    report = run(lm, edited("until: []", "until: ['77']"), journal)
    stopped = [text for text, ended in plain if not ended and "77" in text]
    unfinished = [text for text, ended in plain if not ended and "77" not in text]
    assert stopped
    assert 0 < len(unfinished) < len(plain)
    assert report.rates["truncated"] == len(unfinished) / len(plain)


def test_a_stop_sequence_ends_the_answer(
    lm: JournalledLM,
    edited: Callable[[str, str], Path],
    journal: Journal,
    tmp_path: Path,
    ask: Callable[[str], tuple[str, bool]],
) -> None:
    run(lm, edited("until: []", "until: ['5']"), journal)
    answers = [answer for chunk in chunks(tmp_path / "journal.jsonl") for answer, _ in chunk]
    assert answers[0] == ask("0+0=")[0].split("5")[0]
    assert not any("5" in answer for answer in answers)


SAMPLED = "do_sample: true\n  temperature: 1.0\n  until: []\nrepeats: 3"
GREEDY = "do_sample: false\n  temperature: 0.0\n  until: []"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limits", "generated"),
    [
        ((4, 8, None), [3, 3, 3]),  # 3 samples of 4 problems fill 3 batches of 4
        ((5, None, 3), [4, 6, 1]),  # an unfilled last batch is another batch, and is all that is paid again
    ],
)
def test_growing_limits_generate_each_full_batch_once_and_answer_as_if_alone(
    lm: JournalledLM,
    edited: Callable[[str, str], Path],
    tmp_path: Path,
    *,
    limits: tuple[int | None, ...],
    generated: list[int],
) -> None:
    path = edited(GREEDY, SAMPLED)
    counts = []
    for limit in limits:
        with Journal(tmp_path / "shared.jsonl") as journal:
            before = len((tmp_path / "shared.jsonl").read_text().splitlines())
            shared = run(lm, path, journal, limit=limit)
        counts.append(len((tmp_path / "shared.jsonl").read_text().splitlines()) - before)
        with Journal(tmp_path / f"alone-{limit}.jsonl") as journal:
            assert run(lm, path, journal, limit=limit) == shared
    assert counts == generated


def test_sampled_answers_are_the_same_from_a_journal_cut_anywhere(
    lm: JournalledLM, edited: Callable[[str, str], Path], tmp_path: Path
) -> None:
    path = edited(GREEDY, SAMPLED)
    whole = tmp_path / "whole.jsonl"
    with Journal(whole) as journal:
        report = run(lm, path, journal)
    lines = whole.read_text().splitlines(keepends=True)
    assert len(lines) == 9  # 12 problems, 3 samples each, in batches of 4
    cut = tmp_path / "cut.jsonl"
    cut.write_text("".join(lines[:2] + lines[5:7]) + lines[7][:-9])
    torch.manual_seed(12345)
    with Journal(cut) as journal:
        assert run(lm, path, journal) == report
    assert sorted(map(str, chunks(cut))) == sorted(map(str, chunks(whole)))
    answers = [answer for chunk in chunks(whole) for answer, _ in chunk]
    assert len(set(answers[:3])) == 3
    assert all(score in (0, 1 / 3, 2 / 3, 1) for _, score in report.scores)


def test_repeats_beyond_one_batch_are_other_samples(
    lm: JournalledLM, edited: Callable[[str, str], Path], journal: Journal, tmp_path: Path
) -> None:
    run(lm, edited(GREEDY, SAMPLED.replace("repeats: 3", "repeats: 8")), journal, limit=1)
    first, second = chunks(tmp_path / "journal.jsonl")
    assert first != second


def test_a_limit_scores_the_first_problems(
    lm: JournalledLM, benchmark: Path, journal: Journal, problems: list[dict[str, str]]
) -> None:
    report = run(lm, benchmark, journal, limit=5)
    assert [problem for problem, _ in report.scores] == [problem_id(problem) for problem in problems[:5]]


def test_a_prompt_too_long_for_the_model_is_refused_before_anything_is_generated(
    lm: JournalledLM, journal: Journal, tmp_path: Path
) -> None:
    problems = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "1" * 30, "answer": "2"}]
    path = write_benchmark(tmp_path, "long", problems, max_new_tokens=40)
    with pytest.raises(BenchmarkError, match="problem 1 of long has 31 tokens and may generate 40, more than the 64"):
        run(lm, path, journal)
    assert (tmp_path / "journal.jsonl").read_bytes() == b""


def test_multiple_choice_is_scored_by_likelihood_and_journalled(
    lm: JournalledLM, edited: Callable[[str, str], Path], model: Path, problems: list[dict[str, str]], tmp_path: Path
) -> None:
    path = edited("output_type: generate_until", "output_type: multiple_choice\ndoc_to_choice: ['12', '34', '56']")
    text = path.read_text().replace("doc_to_target: answer", "doc_to_target: 0\ntarget_delimiter: ''")
    text = (
        text[: text.index("filter_list")] + "metric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}"
    )
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("generation_kwargs", "  max", "  do_")))
    path.write_text(text.replace("  temperature: 0.0\n", "").replace("  until: []\n", ""))

    network, tokenizer = Qwen2ForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def likelihood(prompt: str, choice: str) -> float:
        tokens = torch.tensor([tokenizer(prompt + choice)["input_ids"]])
        with torch.no_grad():
            logits = network(tokens).logits[0, :-1].log_softmax(-1)
        return float(logits[-2:].gather(1, tokens[0, -2:, None]).sum())

    def is_right(prompt: str) -> bool:
        return likelihood(prompt, "12") > max(likelihood(prompt, "34"), likelihood(prompt, "56"))

    with Journal(tmp_path / "journal.jsonl") as journal:
        report = run(lm, path, journal)
    assert report.metric == "acc"
    assert [score for _, score in report.scores] == [float(is_right(problem["prompt"])) for problem in problems]
    assert 0 < report.accuracy < 1
    with Journal(tmp_path / "journal.jsonl") as journal:
        assert run(lm, path, journal) == report
    assert len(chunks(tmp_path / "journal.jsonl")) == 9


MATHEMATICS = [
    ("What is half of one?", r"\frac{1}{2}", r"Half: \boxed{0.5}", 1.0),
    ("Factor x^2-1.", "(x-1)(x+1)", r"\boxed{x^2 - 1}", 1.0),
    ("Solve x^2=4.", r"\{-2, 2\}", r"\boxed{\{2, -2\}}", 1.0),
    ("Add 2 and 3.", "5", r"\boxed{6}, no: \boxed{5}", 1.0),
    ("Add 2 and 4.", "6", r"\boxed{6}, no: \boxed{5}", 0.0),
    ("Simplify the root of 8.", r"2\sqrt{2}", r"\boxed{\sqrt{8}}", 1.0),
    ("A quarter turn?", r"\frac{\pi}{2}", r"\boxed{\pi/2}", 1.0),
    ("List two primes.", "[2,5]", r"\boxed{[2,5]}", 1.0),
    ("Ten cubed?", "1000", r"\boxed{1,000}", 1.0),
    ("Seven?", "7", "It is 7.", 0.0),
    ("Eight?", "8", r"\boxed{8", 0.0),
    ("Is 4 even?", r"\text{yes}", r"\boxed{\text{yes}}", 1.0),
]


class Canned(LM):  # type: ignore[misc]  # lm_eval carries no types
    """Answers from a table: a random model boxes nothing, and a real one that does would not fit a test."""

    def __init__(self) -> None:
        super().__init__()
        self.truncated: list[bool] = []

    def generate_until(self, requests: list[Instance]) -> list[str]:
        answers = {prompt: answer for prompt, _, answer, _ in MATHEMATICS}
        self.truncated = [False for _ in requests]
        return [answers[request.args[0]] for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise NotImplementedError


def test_boxed_mathematics_is_graded_through_lm_eval(journal: Journal, tmp_path: Path) -> None:
    problems = [{"prompt": prompt, "answer": answer} for prompt, answer, _, _ in MATHEMATICS]
    path = write_benchmark(tmp_path, "boxes", problems, max_new_tokens=40, base="boxed_math", order="given")
    boxes = assignment(path)
    report, _ = score(Canned(), load_task(boxes), assignment=boxes, model="canned", limit=None, journal=journal)
    assert [score for _, score in report.scores] == [expected for _, _, _, expected in MATHEMATICS]
    assert report.metric == "correct"
    assert report.rates == {"boxed": 10 / 12, "repeated": 0.0, "truncated": 0.0}


def test_weights_that_leave_a_tensor_unfilled_are_refused(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .* such as model\.norm\.weight"):
        JournalledLM(copy, device="cpu", dtype="float32", batch_size=1)


def test_truncated_weights_are_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(model, tmp_path / "copy"))
    weights = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(weights[:-100])
    with pytest.raises(ModelError, match="cannot be loaded: ") as refusal:
        JournalledLM(copy, device="cpu", dtype="float32", batch_size=1)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "score_exact_match",
            "score_nothing",
            "lm-eval cannot load .*has no function|lm-eval cannot load .*score_nothing",
        ),
        ("test_split: test", "test_split: absent", "lm-eval cannot load .*KeyError: 'absent'"),
        ("higher_is_better: true", "higher_is_better: false", "exact_match, where lower is better"),
    ],
)
def test_a_benchmark_lm_eval_cannot_run_is_refused(
    edited: Callable[[str, str], Path], old: str, new: str, message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        load_task(assignment(edited(old, new)))
