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

# Right answers, labelled by hand: (what a model puts in the box, what the data set has).
RIGHT = [
    (r"5", r"5"),
    (r" 7 ", r"7"),
    (r"\frac{1}{2}", r"0.5"),
    (r"1/2", r"\frac{2}{4}"),
    (r"\dfrac12", r"\frac{1}{2}"),
    (r"-\frac12", r"\frac{-1}{2}"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    (r"2 1/2", r"2.5"),
    (r"\frac{\sqrt3}{2}", r"\frac{\sqrt{3}}{2}"),
    (r"\sqrt{8}", r"2\sqrt{2}"),
    (r"\frac{\pi}{4}", r"\pi/4"),
    (r"\sqrt[3]{8}", r"2"),
    (r"\binom{5}{2}", r"10"),
    (r"3\times 10^5", r"300000"),
    (r"1,000", r"1000"),
    (r"1{,}000", r"1000"),
    (r"12\,345", r"12345"),
    (r"12.", r"12"),
    (r".5", r"0.5"),
    (r"12.0", r"12"),
    (r"$5$", r"5"),
    (r"\$5.00", r"5"),
    (r"18", r"\$18"),
    (r"30^\circ", r"30"),
    (r"30", r"30^{\circ}"),
    (r"30\text{ degrees}", r"30^\circ"),
    (r"50\%", r"50"),
    (r"50\%", r"0.5"),
    (r"50", r"50\%"),
    (r"12\text{ cm}", r"12"),
    (r"12", r"12\text{ cm}^2"),
    (r"12\pi\text{ square inches}", r"12\pi"),
    (r"60\text{ km/h}", r"60"),
    (r"\text{even}", r"\text{even}"),
    (r"even", r"\text{even}"),
    (r"\text{Even}", r"\text{even}"),
    (r"\text{(C)}", r"C"),
    (r"C", r"\textbf{(C)}"),
    (r"\text{5}", r"5"),
    (r"2x+1", r"1+2x"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"\frac{x+1}{x}", r"1+\frac{1}{x}"),
    (r"y = 2x + 1", r"y=2x+1"),
    (r"4x-2y+2=0", r"2x-y+1=0"),
    (r"x=5", r"5"),
    (r"f(x) = x^2", r"x^2"),
    (r"2+2=4", r"4"),
    (r"5", r"x=5"),
    (r"(1, -2)", r"(1,-2)"),
    (r"\left( 1, -2 \right)", r"(1,-2)"),
    (r"x=1,y=2", r"(1,2)"),
    (r"1,2", r"(1,2)"),
    (r"[2,5]", r"[2,5]"),
    (r"x \in [1,2]", r"[1,2]"),
    (r"[0,1)", r"0\le x<1"),
    (r"(5,\infty)", r"x>5"),
    (r"(-\infty, 2)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,2)"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    (r"2, 1", r"1, 2"),
    (r"1 \text{ or } 2", r"1,2"),
    (r"5, -5", r"\pm 5"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\begin{pmatrix}0.5\\1\end{pmatrix}", r"\begin{pmatrix}\frac12\\1\end{pmatrix}"),
    (r"11_2", r"11_{2}"),
    (r"1:2", r"\frac12"),
    (r"3+4i", r"4i+3"),
]
# Wrong answers, most of them near the right one. math-verify alone accepts those after the blank line.
WRONG = [
    (r"6", r"5"),
    (r"", r"5"),
    (r"-5", r"5"),
    (r"\pm 5", r"5"),
    (r"5", r"\pm 5"),
    (r"0.33", r"\frac13"),
    (r"1234567", r"1234568"),
    (r"12345678901234567890", r"12345678901234567891"),
    (r"2.9999999", r"3"),
    (r"10.000", r"10000"),
    (r"0.5", r"50"),
    (r"x+1", r"x-1"),
    (r"a-b", r"b-a"),
    (r"2x", r"2y"),
    (r"\sqrt{x^2}", r"x"),
    (r"2\sqrt3", r"3\sqrt2"),
    (r"12\pi", r"12"),
    (r"\frac{1}{0}", r"1"),
    (r"\frac12", r"-\frac12"),
    (r"1\frac{1}{2}", r"\frac{11}{2}"),
    (r"y=5", r"x=5"),
    (r"x>5", r"x\ge 5"),
    (r"x<2", r"x<3"),
    (r"[2,5]", r"[2,6]"),
    (r"[2,5]", r"(2,5)"),
    (r"[1,2)", r"(1,2]"),
    (r"[1,2]", r"[1,2]\cup[3,4]"),
    (r"(1,2)", r"(2,1)"),
    (r"2,1", r"(1,2)"),
    (r"(1,2,3)", r"(1,2)"),
    (r"1", r"1,2"),
    (r"1,2,3", r"1,2"),
    (r"1,2", r"12"),
    (r"3-4i", r"3+4i"),
    (r"\infty", r"-\infty"),
    (r"\emptyset", r"0"),
    (r"\text{odd}", r"\text{even}"),
    (r"\text{(B)}", r"\text{(A)}"),
    (r"\text{Monday}", r"\text{Tuesday}"),
    (r"\begin{pmatrix}2\\1\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    (r"\begin{vmatrix}1&2\\3&4\end{vmatrix}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\sqrt{10^{20}+1}", r"10^{10}"),
    (r"}{", r"1"),
    (r"9^9^9", r"5"),
    (r"\text{not }5", r"5"),

    (r"5\text{ cm}", r"5\text{ m}"),
    (r"5\text{ cm}^2", r"5\text{ cm}"),
    (r"10\text{ a.m.}", r"10\text{ p.m.}"),
    (r"20\%", r"20^\circ"),
    (r"5\text{ million}", r"5"),
    (r"5", r"5\text{ million}"),
    (r"5\text{ dozen}", r"5"),
    (r"5\text{ and a half}", r"5"),
    (r"5\text{ is not the answer}", r"5"),
    (r"5\mathrm{i}", r"5"),
    (r"5\text{e}", r"5"),
    (r"3=4", r"4"),
    (r"2+2=5", r"5"),
    (r"x^2+y^2=4", r"4"),
    (r"1 2", r"3"),
    (r"5\quad 6", r"11"),
    (r"11_3", r"11_2"),
    (r"R^2-r^2", r"0"),
    (r"(1,2)", r"\{1,2\}"),
    (r"\{1,2,3\}", r"(1,2,3)"),
    (r"3,2,1", r"(1,2,3)"),
    (r"3.141593", r"\pi"),
    (r"0.333333", r"\frac13"),
    (r"1.414214", r"\sqrt2"),
    (r"0.0000001", r"0.0000002"),
    (r"6, \boxed{5}", r"5"),
    (r"20:60", r"10:30"),
]  # fmt: skip
# Right answers that are counted as wrong. To read them one would have to guess.
REJECTED_THOUGH_RIGHT = [
    (r"\text{five}", r"5"),
    (r"5 dollars", r"5"),
    (r"5\text{th}", r"5"),
    (r"10\text{ a.m.}", r"10"),
    (r"5\text{ million}", r"5000000"),
    (r"1\text{ hour}", r"60\text{ minutes}"),
    (r"20^{\circ}\text{C}", r"20"),
    (r"90^\circ", r"\frac{\pi}{2}"),
    (r"\sin 30^\circ", r"\frac12"),
    (r"0.\overline{3}", r"\frac13"),
    (r"1.0e3", r"1000"),
    (r"\text{no solution}", r"\emptyset"),
    (r"\text{A, B}", r"A,B"),
    (r"\frac{a}{b}=5", r"5"),
    (r"1<x<2", r"(1,2)"),
]


@pytest.mark.parametrize(("answer", "gold"), RIGHT)
def test_a_right_answer_is_right_however_it_is_written(answer: str, gold: str) -> None:
    assert equal_math(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), WRONG)
def test_a_wrong_answer_is_wrong_however_near_it_is(answer: str, gold: str) -> None:
    assert not equal_math(answer, gold)


@pytest.mark.parametrize(("answer", "gold"), REJECTED_THOUGH_RIGHT)
def test_some_right_answers_are_counted_as_wrong(answer: str, gold: str) -> None:
    assert not equal_math(answer, gold)


def test_the_table_is_long_enough_to_mean_something() -> None:
    assert len({*RIGHT, *WRONG, *REJECTED_THOUGH_RIGHT}) >= 150


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
