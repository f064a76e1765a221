import dataclasses
import json
import math
from pathlib import Path

import pytest

from evaluation.errors import ComparisonError, ReportError
from evaluation.verdict.differences import find_differences
from evaluation.verdict.report import Evaluated, Report


def report(*scores: float) -> Report:
    return Report(
        model="/models/a",
        model_digest="m",
        benchmark="plus",
        benchmark_digest="b",
        metric="exact_match",
        scores=tuple((f"problem {number}", score) for number, score in enumerate(scores)),
        rates={"truncated": 0.25},
        settings={"batch_size": 64, "limit": None, "temperature": 0.7, "dtype": "float32"},
        seconds=12.5,
    )


def test_a_report_read_back_equals_the_one_written(tmp_path: Path) -> None:
    written = report(1.0, 0.125, 1 / 3)
    written.write(tmp_path / "report.json")
    read = Report.read(tmp_path / "report.json")
    assert read == written
    assert read.seconds == written.seconds
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


def test_time_spent_is_no_part_of_the_result() -> None:
    assert dataclasses.replace(report(1.0), seconds=1.0) == report(1.0)


def test_accuracy_and_standard_error_are_those_of_the_problems() -> None:
    half = report(1.0, 0.0, 0.5, 0.5)
    assert (half.n, half.accuracy) == (4, 0.5)
    assert half.standard_error == pytest.approx(math.sqrt(0.5 / 3) / 2)
    assert math.isnan(report(1.0).standard_error)


def test_the_interval_is_that_of_shares_or_of_resampled_problems() -> None:
    # Wilson's for 8 of 10 as printed in textbooks; a symmetric interval would pass 1.
    assert report(*[1.0] * 8, 0.0, 0.0).interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = report(*[0.25, 0.5, 0.75] * 10).interval
    assert 0.42 < low < 0.44
    assert 0.56 < high < 0.58


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"scores": [["a", 1.0]]}', '{"scores": [1]}'])
def test_a_file_that_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=r"report\.json cannot be read: not a report"):
        Report.read(path)


def test_a_missing_report_is_named(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"absent\.json cannot be read: .*No such file"):
        Report.read(tmp_path / "absent.json")


def test_samples_of_other_problems_are_not_told_apart_problem_by_problem(tmp_path: Path) -> None:
    sides = []
    for side, digest in (("one", "a"), ("other", "b")):
        sample = {"doc_id": 3, "doc_hash": digest, "filter": "none", "exact_match": 1.0}
        (tmp_path / side).write_text(json.dumps(sample) + "\n")
        sides.append(Evaluated(report(1.0), tmp_path / "results", tmp_path / side))
    assert find_differences(sides[0], sides[0]) == []
    with pytest.raises(ComparisonError, match=r"problem 3 of .*one is another than that of .*other: score both again"):
        find_differences(*sides)
