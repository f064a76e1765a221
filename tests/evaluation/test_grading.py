import time

import pytest

from evaluation.grading import equal_math, last_boxed, score_boxed_math, score_exact_match


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


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("5", "5"),
        (r"\frac{1}{2}", "0.5"),
        ("1/2", r"\frac{2}{4}"),
        ("2x+1", "1+2x"),
        (r"\sqrt{8}", r"2\sqrt{2}"),
        ("[2,5]", "[2,5]"),
        (r"\{1, 2\}", r"\{2, 1\}"),
        ("1,000", "1000"),
        (r"\pi/4", r"\frac{\pi}{4}"),
        (r"\text{even}", r"\text{even}"),
        ("(1, -2)", "(1,-2)"),
        (" 7 ", "7"),
    ],
)
def test_equal_answers_written_differently_are_equal(answer: str, gold: str) -> None:
    assert equal_math(answer, gold)


@pytest.mark.parametrize(
    ("answer", "gold"),
    [("6", "5"), ("", "5"), ("[2,5]", "[2,6]"), ("x+1", "x-1"), ("(1,2)", "(2,1)"), (r"\frac{1}{0}", "1"), ("}{", "1")],
)
def test_different_or_malformed_answers_are_not_equal(answer: str, gold: str) -> None:
    assert not equal_math(answer, gold)


def test_an_answer_of_unbounded_length_is_refused_unread() -> None:
    started = time.monotonic()
    assert not equal_math("+1" * 5000, "5000")
    assert time.monotonic() - started < 0.1


def test_an_answer_that_takes_for_ever_is_wrong_after_seconds() -> None:
    started = time.monotonic()
    assert not equal_math("9^{9^{9^{9}}}", "5")
    assert time.monotonic() - started < 8


def test_what_a_model_writes_is_never_executed() -> None:
    assert not equal_math("__import__('os')._exit(3)", "3")


def test_repeats_are_averaged_and_missing_boxes_counted() -> None:
    results = [[r"\boxed{4}", r"\boxed{2+2}", "4", r"\boxed{5}"]]
    assert score_boxed_math({"answer": "4"}, results) == {"correct": 0.5, "answered": 0.75}
    assert score_exact_match({"answer": "4"}, [[" 4\n", "4.", "", "4"]]) == {"exact_match": 0.5, "answered": 0.75}


def test_a_benchmark_with_lm_evals_own_filter_is_scored_too() -> None:
    assert score_exact_match({"answer": "4"}, ["4"]) == {"exact_match": 1.0, "answered": 1.0}
