import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations

import psutil
import pytest

from evaluation.errors import WorkerError
from evaluation.grading import equality
from evaluation.grading.equality import Comparer, comparer
from evaluation.grading.score import ends_in_loop, equal_math, last_boxed, pass_at, score_boxed_math, score_exact_match
from tests.evaluation.grading.labelled import REJECTED_THOUGH_RIGHT, RIGHT, WRONG

MOST_REJECTED = 0.03


def labelled(table: dict[str, list[tuple[str, str]]]) -> list[tuple[str, str]]:
    return [pair for pairs in table.values() for pair in pairs]


@pytest.mark.parametrize(("answer", "gold"), labelled(RIGHT))
def test_a_right_answer_is_right_however_it_is_written(answer: str, gold: str) -> None:
    assert equal_math(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), labelled(WRONG))
def test_a_wrong_answer_is_wrong_however_near_it_is(answer: str, gold: str) -> None:
    assert not equal_math(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), labelled(REJECTED_THOUGH_RIGHT))
def test_some_right_answers_are_counted_as_wrong(answer: str, gold: str) -> None:
    assert not equal_math(answer, gold)


def test_the_table_is_long_enough_to_mean_something_and_few_right_answers_are_rejected() -> None:
    right, rejected = labelled(RIGHT), labelled(REJECTED_THOUGH_RIGHT)
    each = [*right, *labelled(WRONG), *rejected]
    assert len(each) == len({*each}) >= 400
    assert len(rejected) <= MOST_REJECTED * (len(right) + len(rejected))


def test_what_is_right_is_right_the_other_way_round_where_no_side_has_more_to_say() -> None:
    for kind in ("fractions and mixed numbers", "expressions in letters", "matrices and vectors", "lists and sets"):
        for answer, gold in RIGHT[kind]:
            assert equal_math(gold, answer), (gold, answer)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{5}.", "5"),
        (r"first \boxed{5}, no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\left\{1, 2\right\}}", r"\left\{1, 2\right\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{5} and again \boxed{5", "5"),
        (r"\boxed{\boxed{7}}", "7"),
        ("5", None),
        (r"\boxed{5", None),
    ],
)
def test_the_last_complete_box_is_the_answer(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize("text", [r"\boxed{" * 200_000, "{" * 2_000_000, r"\boxed{1}" * 200_000, "\\" * 2_000_000])
def test_a_megabyte_of_boxes_is_read_in_one_go(text: str) -> None:
    started = time.monotonic()
    last_boxed(text)
    ends_in_loop(text)
    assert time.monotonic() - started < 2


HOSTILE = [
    r"9^{9^{9^{9}}}",
    r"9**9**9**9",
    r"(((10^{10})^{10})^{10})^{10}!",
    r"99999999!",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n^{3}+n}",
    r"\prod_{n=1}^{99999999} n",
    r"\int_0^1 \frac{x^x \sin(x^x)}{\ln(1+x^{x^x})} dx",
    r"\binom{10^{9}}{5\cdot 10^{8}}",
    "+1" * 249,
    "(" * 240 + "1" + ")" * 240,
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "x" * 500,
    r"\text{" + "a " * 240 + "!",
    "1" + " " * 400 + "1x",
    "1,000" * 90 + "x",
    r"1\," * 160 + "x",
    "-" * 499 + "5",
    "9" * 499,
    "^" * 300,
    "\\" * 499,
    "5\x00",
    "5\ud800",
    "5\n\n5",
]


@pytest.fixture(scope="module")
def impatient() -> Iterator[None]:
    """Let answers have half a second of computing instead of five: the suite has no more time than its reader."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equality, "SECONDS", 0.5)
        comparer().close()
        yield
    comparer().close()


@pytest.mark.parametrize("answer", HOSTILE, ids=lambda answer: ascii(answer)[:24])
@pytest.mark.usefixtures("impatient")
def test_a_hostile_answer_is_wrong_within_the_limit(answer: str) -> None:
    comparer().equal("1", "1")
    started = time.monotonic()
    assert not equal_math(answer, "7")
    # The limit is of computing, and the machine may have other work.
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("answer", ["+1" * 500_000, "{" * 1_000_000, "9" * 1_000_000, r"\frac{1}" * 100_000])
def test_an_answer_of_a_megabyte_is_refused_unread(answer: str) -> None:
    started = time.monotonic()
    assert not equal_math(answer, "7")
    assert time.monotonic() - started < 0.2


@pytest.mark.parametrize(
    "answer",
    [
        "__import__('os')._exit(3)",
        "__import__('pathlib').Path('{}').touch()",
        "().__class__.__base__.__subclasses__()",
        "lambda: 7",
        "exec(\"open('{}','w')\")",
        "S(open('{}','w'))",
        r"\input{/etc/passwd}",
        r"\write18{touch {}}",
    ],
)
def test_what_a_model_writes_is_never_executed(answer: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    directory = tmp_path_factory.mktemp("answers")
    assert not equal_math(answer.replace("{}", str(directory / "made")), "7")
    assert not list(directory.iterdir())
    assert equal_math("3+4", "7")


def test_an_answer_that_cannot_be_computed_costs_its_process_and_the_next_has_another() -> None:
    one = Comparer()
    assert one.equal("3+4", "7")
    assert one._process is not None
    first = one._process
    started = time.process_time()
    assert not one.equal(r"\prod_{n=1}^{99999999} n", "7")
    assert time.process_time() - started < 1
    assert first.poll() is not None
    assert one.equal("3+4", "7")
    one.close()


def test_the_comparing_process_ends_with_the_one_that_asks() -> None:
    script = (
        "from evaluation.grading.equality import comparer\n"
        "comparer().equal('1', '1'); print(comparer()._process.pid, flush=True)"
    )
    asked = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    process = int(asked.stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux alone kills orphans on request")
def test_the_comparing_process_dies_with_a_killed_one_even_while_it_computes() -> None:
    script = """
        import json, os, signal
        from evaluation.grading import equality
        equality.SECONDS = 1000.0
        comparer = equality.Comparer()
        assert comparer.equal("1", "1")
        endless = r"\\prod_{n=1}^{99999999} n"
        comparer._process.stdin.write(json.dumps([endless, "7"]).encode() + b"\\n")
        comparer._process.stdin.flush()
        print(comparer._process.pid, flush=True)
        signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        try:
            assert parent.stdout is not None
            process = psutil.Process(int(parent.stdout.readline()))
            used = process.cpu_times().user
            while process.cpu_times().user < used + 0.2:
                time.sleep(0.01)
        finally:
            parent.kill()
    _, alive = psutil.wait_procs([process], timeout=120)
    for each in alive:
        each.kill()
    assert not alive


def test_the_limit_holds_where_its_signal_is_ignored_and_blocked() -> None:
    one = Comparer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equality, "SECONDS", 0.2)
        before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPROF})
        try:
            assert one.equal("1", "1")
        finally:
            signal.signal(signal.SIGPROF, before)
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    started = time.monotonic()
    assert not one.equal(r"\prod_{n=1}^{99999999} n", "7")
    assert time.monotonic() - started < 10
    one.close()


def test_a_process_that_died_unasked_costs_no_answer() -> None:
    one = Comparer()
    assert one.equal("1", "1")
    assert one._process is not None
    one._process.kill()
    one._process.wait()
    assert one.equal(r"\frac12", "0.5")
    one.close()


def test_an_installation_that_cannot_compare_says_so_and_scores_nothing_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(WorkerError, match="the process that compares answers does not start: run"):
        Comparer().equal("1", "1")


def test_a_judge_speaks_one_line_a_question() -> None:
    asked = "".join(json.dumps(pair) + "\n" for pair in ([r"\frac12", "0.5"], ["(", ")"], ["2", "3"]))
    answered = subprocess.run(
        [sys.executable, "-m", "evaluation.grading.equality", "5"],
        input=asked,
        capture_output=True,
        text=True,
        check=True,
    )
    assert answered.stdout.splitlines() == ["ready", "true", "false", "false"]


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("So the answer is 4. " * 20, True),
        ("Let me think. " + "So the answer is 4. " * 20 + "So the an", True),
        ("0." + "3" * 300, True),
        (" ".join(f"step {number}" for number in range(200)) + " wait, no." * 25, True),
        ("".join(chr(97 + number % 26) * (number % 7) for number in range(700)), False),
        ("So the answer is 4. " * 3, False),
        ("wait, no." * 25 + " ".join(f"step {number}" for number in range(20)), False),
        ("no " * 66, False),
        ("no " * 67, True),
        ("", False),
    ],
)
def test_an_answer_repeats_when_it_ends_in_a_passage_four_times_over(text: str, loops: bool) -> None:
    assert ends_in_loop(text) == loops


def test_a_loop_of_a_long_passage_is_found_and_of_a_longer_one_not() -> None:
    passage = " ".join(str(number * number) for number in range(400))
    assert ends_in_loop(passage[:900] * 5)
    assert not ends_in_loop(passage[:1100] * 5)


def test_repeats_are_averaged_and_missing_boxes_counted() -> None:
    results = [[r"\boxed{4}", r"\boxed{2+2}", "4", r"\boxed{5}" + "no " * 100]]
    scores = score_boxed_math({"answer": "4"}, results)
    assert scores == {"correct": 0.5, "boxed": 0.75, "repeated": 0.25, "pass@2": pytest.approx(5 / 6), "pass@4": 1.0}
    assert score_boxed_math({"answer": "4"}, [r"\boxed{4}"]) == {"correct": 1.0, "boxed": 1.0, "repeated": 0.0}
    assert score_exact_match({"answer": "4"}, [[" 4\n", "4.", "", "4"]]) == {"exact_match": 0.5, "answered": 0.75}


@pytest.mark.parametrize("correct", range(9))
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_pass_at_k_is_the_share_of_all_choices_of_k_samples_that_hold_a_right_one(k: int, correct: int) -> None:
    samples = [number < correct for number in range(8)]
    choices = [any(choice) for choice in combinations(samples, k)]
    assert pass_at(k, n=8, correct=correct) == pytest.approx(float(Fraction(sum(choices), len(choices))))


def test_a_benchmark_with_lm_evals_own_filter_is_scored_too() -> None:
    assert score_exact_match({"answer": "4"}, ["4"]) == {"exact_match": 1.0, "answered": 1.0}
