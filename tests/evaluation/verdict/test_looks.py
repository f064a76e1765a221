"""Looks at a gate: what many of them may spend together, and what counts as one."""

import functools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evaluation.errors import ReportError
from evaluation.verdict.bounds import paired_bounds
from evaluation.verdict.gate import gate
from evaluation.verdict.looks import PLANNED, spend
from evaluation.verdict.report import Report

N = 400


def report(scores: list[float], model: str, *, first: int = 0) -> Report:
    problems = tuple((f"{first + number:064d}"[::-1], score) for number, score in enumerate(scores))
    return Report(model, model, "math_gate", f"{len(scores)}", "exact_match", problems, {}, {}, 0.0)


def pair(random: np.random.Generator, name: str, n: int = N) -> list[Report]:
    """Return two models that are equally good, on the same problems."""
    return [report(random.binomial(1, 0.5, n).astype(float).tolist(), f"{name}{which}") for which in "ab"]


@functools.cache
def passes(wins: int, losses: int, n: int, error: float) -> bool:
    ours, theirs = [1.0] * wins + [0.0] * (n - wins), [0.0] * wins + [1.0] * losses + [0.0] * (n - wins - losses)
    return paired_bounds(ours, theirs, margin=0.0, confidence=1 - error).lower_bound > 0


def test_eight_edits_of_the_settings_pass_by_luck_no_more_often_than_one_look(tmp_path: Path) -> None:
    """Eight candidates that are no better, each decided anew. 1,000 rounds, error .007 at .05."""
    random, path = np.random.default_rng(1), tmp_path / "looks.json"
    errors = [spend(path, pair(random, str(edit)), confidence=0.95).error for edit in range(8)]
    counts = random.multinomial(N, (0.1, 0.1, 0.8), size=(1000, 8))

    def share(errors: Sequence[float]) -> float:
        rounds = [
            [passes(int(up), int(down), N, error) for (up, down, _), error in zip(each, errors, strict=True)]
            for each in counts
        ]
        return float(np.mean([any(each) for each in rounds]))

    assert share([0.05] * 8) > 0.25
    assert share(errors) <= 0.05 + 0.021


def test_more_and_more_of_the_problems_are_looks_at_one_gate(tmp_path: Path) -> None:
    """`--limit` 64, 256, then all, on one pair of models that are equally good. 1,000 rounds, error .007 at .05."""
    random, path, parts = np.random.default_rng(2), tmp_path / "looks.json", (64, 256, 1000)
    whole = pair(random, "", 1000)
    looks = [spend(path, [replace(each, scores=each.scores[:n]) for each in whole], confidence=0.95) for n in parts]
    assert [look.number for look in looks] == [1, 2, 3]
    drawn = random.choice([1, -1, 0], p=(0.1, 0.1, 0.8), size=(1000, 1000))

    def share(errors: Sequence[float]) -> float:
        rounds = [
            [
                passes(int((each[:n] > 0).sum()), int((each[:n] < 0).sum()), n, error)
                for n, error in zip(parts, errors, strict=True)
            ]
            for each in drawn
        ]
        return float(np.mean([any(each) for each in rounds]))

    assert share([0.05] * 3) > 0.08
    assert share([look.error for look in looks]) <= 0.05 + 0.021


def test_looks_never_spend_more_than_there_is(tmp_path: Path) -> None:
    random, path = np.random.default_rng(3), tmp_path / "looks.json"
    looks = [spend(path, pair(random, str(number)), confidence=0.95, planned=3) for number in range(9)]
    assert [look.number for look in looks] == list(range(1, 10))
    assert [look.error for look in looks[:3]] == pytest.approx([PLANNED * 0.05 / 3] * 3)
    assert [look.error for look in looks[3:5]] == pytest.approx([0.005, 0.0025])
    assert 0 < looks[-1].error < sum(look.error for look in looks) < 0.05


def test_one_plan_after_another_and_a_higher_confidence_spend_what_is_left(tmp_path: Path) -> None:
    random, path = np.random.default_rng(4), tmp_path / "looks.json"
    spend(path, pair(random, "a"), confidence=0.95)
    assert spend(path, pair(random, "b"), confidence=0.95, planned=5).error == pytest.approx(0.8 * 0.05 / 5)
    reports = [report([1.0] * N, "better"), report([0.0] * N, "worse")]
    last = spend(path, reports, confidence=0.99)
    assert last.error == 0
    assert not gate(*reports, margin=0.0, confidence=0.99, look=last).passed


def test_the_same_comparison_again_is_the_same_look(tmp_path: Path) -> None:
    path, reports = tmp_path / "looks.json", pair(np.random.default_rng(5), "a")
    first = spend(path, reports, confidence=0.95)
    before = path.read_bytes()
    assert spend(path, reports, confidence=0.9, planned=3) == first
    assert path.read_bytes() == before


def test_other_problems_are_another_gate(tmp_path: Path) -> None:
    path = tmp_path / "looks.json"
    for number in range(3):
        reports = [report([1.0, 0.0, 1.0], f"{number}{which}", first=10 * number) for which in "ab"]
        assert spend(path, reports, confidence=0.95).number == 1
    reports = [report([1.0, 0.0, 1.0], f"over {which}", first=12) for which in "ab"]
    assert spend(path, reports, confidence=0.95).number == 2


def test_the_sentence_says_which_look_it_is(tmp_path: Path) -> None:
    random, path = np.random.default_rng(6), tmp_path / "looks.json"
    for number in range(3):
        spend(path, pair(random, str(number)), confidence=0.95)
    reports = pair(random, "again")
    look = spend(path, reports, confidence=0.95)
    decision = gate(reports[0], reports[1], margin=0.0, look=look)
    assert "with 99.88 % confidence" in decision.sentence
    assert ", look 4 at math_gate, 95 % over all looks); not shown" in decision.sentence


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"gates": {}, "looks": [{"number": 1}]}'])
def test_a_damaged_file_gives_no_new_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "looks.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"looks\.json cannot be read: .*bring it back, or take a gate of other"):
        spend(path, pair(np.random.default_rng(0), "a"), confidence=0.95)
    assert path.read_text() == text


def test_the_file_is_small_and_of_plain_types(tmp_path: Path) -> None:
    path, random = tmp_path / "looks.json", np.random.default_rng(7)
    for number in range(5):
        spend(path, pair(random, str(number)), confidence=0.95)
    assert len(json.loads(path.read_text())["gates"]) == 1
    assert path.stat().st_size < 40 * N
