"""Two stored results judged: whoever wrote them, from files alone."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from evaluation.problems import problem_id
from evaluation.verdict.report import Report
from flows.cli.main import app

GOOD, BAD = [1.0] * 30 + [0.0] * 10, [1.0] * 10 + [0.0] * 30


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plain(path: Path, scores: Sequence[float | bool], **columns: Sequence[object]) -> Path:
    more = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)] or [{}] * 1000
    return write(path, [{"id": f"q{n}", "score": score, **more[n]} for n, score in enumerate(scores)])


def doc(number: int) -> dict[str, Any]:
    return {"question": f"{number} + {number} =", "answer": str(2 * number), "subject": f"part {number % 8}"}


def samples(path: Path, scores: Mapping[tuple[str, str], Sequence[float]], **changed: Any) -> Path:
    """Write a file as lm-eval does: a row a problem and filter, all metrics of that filter in it."""
    filters = list(dict.fromkeys(name for _, name in scores))
    rows = []
    for name in filters:
        metrics = {metric: values for (metric, of), values in scores.items() if of == name}
        for number in range(len(next(iter(metrics.values())))):
            row = {"doc_id": number, "doc": doc(number), "target": "x", "resps": [["x"]], "filter": name}
            row |= {"metrics": [*metrics], "doc_hash": f"hash {number}"}
            rows.append(row | {metric: values[number] for metric, values in metrics.items()} | changed)
    return write(path, rows)


def report(path: Path, scores: Sequence[float], **settings: Any) -> Path:
    Report(
        model="/models/m",
        model_digest=path.name,
        benchmark="plus",
        benchmark_digest="b",
        metric="exact_match",
        scores=tuple((problem_id(doc(number)), score) for number, score in enumerate(scores)),
        rates={},
        settings=settings,
        seconds=1.0,
    ).write(path)
    return path


def relex(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["gate", *map(str, arguments)])


@pytest.mark.parametrize(
    ("ours", "theirs", "status", "words"),
    [
        (GOOD, BAD, 0, "it is better: passed."),
        (BAD, GOOD, 1, "it is worse: with 95 % confidence the difference is at most"),
        (GOOD, GOOD, 2, "not shown: "),
    ],
)
def test_the_exit_status_is_the_verdict(
    ours: list[float], theirs: list[float], status: int, words: str, tmp_path: Path
) -> None:
    judged = relex(plain(tmp_path / "a.jsonl", ours), plain(tmp_path / "b.jsonl", theirs))
    assert judged.exit_code == status, judged.output
    assert f"On 40 problems of a, {tmp_path}/a.jsonl scores {sum(ours) / 40:.4f}" in judged.stdout
    assert words in judged.stdout


def test_true_and_means_of_several_answers_are_scores_and_the_order_does_not_matter(tmp_path: Path) -> None:
    rows = [{"id": n, "score": 0.25 + (n % 3) / 4} for n in range(90)]
    ours = write(tmp_path / "a.jsonl", rows[::-1])
    theirs = write(tmp_path / "b.jsonl", [{"id": str(n), "score": n % 7 == 0} for n in range(90)])
    judged = relex(ours, theirs, "--json")
    assert judged.exit_code == 0, judged.output
    content = json.loads(judged.stdout)
    assert (content["n"], content["verdict"], content["method"]) == (90, "passed", "Hall's t")
    assert content["sentence"].startswith("On 90 problems of a, ")


def test_a_margin_asks_whether_no_more_than_that_is_lost(tmp_path: Path) -> None:
    paths = [plain(tmp_path / f"{name}.jsonl", [1.0] * 400 + [float(name == "b")]) for name in "ab"]
    assert relex(*paths).exit_code == 2
    assert relex(*paths, "--margin", "0.02").exit_code == 0


def test_samples_of_lm_eval_are_compared_by_the_first_metric_and_filter_which_is_said(tmp_path: Path) -> None:
    scores = {
        ("exact_match", "strict-match"): GOOD,
        ("acc", "strict-match"): GOOD,
        ("exact_match", "flexible-extract"): BAD,
    }
    ours = samples(tmp_path / "a" / "samples_gsm8k_2026-11-22T10-00-00.123456.jsonl", scores)
    theirs = samples(
        tmp_path / "b" / "samples_gsm8k_2026-11-21T10-00-00.123456.jsonl",
        {("exact_match", "strict-match"): BAD, ("exact_match", "flexible-extract"): GOOD, ("acc", "strict-match"): BAD},
    )
    judged = relex(ours, theirs)
    assert judged.exit_code == 0, judged.output
    first, second = judged.stdout.splitlines()
    assert first == (
        "exact_match after filter strict-match is compared; --metric takes acc; --filter takes flexible-extract"
    )
    assert second.startswith("On 40 problems of gsm8k, ")
    other = relex(ours, theirs, "--filter", "flexible-extract", "--json")
    assert (other.exit_code, json.loads(other.stdout)["filter"]) == (1, "flexible-extract")
    # The directories they lie in are the same results.
    assert relex(tmp_path / "a", tmp_path / "b").exit_code == 0


def test_a_directory_of_several_tasks_is_one_result_whose_tasks_are_clusters(tmp_path: Path) -> None:
    for name, scores in (("a", GOOD), ("b", BAD)):
        for task in range(12):
            path = tmp_path / name / f"samples_mmlu_part_{task}_2026-11-22T10-00-00.1.jsonl"
            samples(path, {("acc", "none"): scores})
    judged = relex(tmp_path / "a", tmp_path / "b", "--cluster", "task", "--json")
    assert judged.exit_code == 0, judged.output
    content = json.loads(judged.stdout)
    assert (content["n"], content["clusters"], content["method"]) == (480, 12, "t over 12 clusters")
    again = tmp_path / "a" / "samples_mmlu_part_0_2026-11-23T10-00-00.1.jsonl"
    samples(again, {("acc", "none"): GOOD})
    refused = relex(tmp_path / "a", tmp_path / "b")
    assert refused.exit_code == 3
    assert "has two results of mmlu_part_0" in refused.stderr


def test_a_report_knows_the_problems_of_samples_by_their_content(tmp_path: Path) -> None:
    ours = report(tmp_path / "report.json", GOOD)
    theirs = samples(tmp_path / "samples.jsonl", {("exact_match", "all"): BAD})
    assert relex(ours, theirs).exit_code == 0
    assert relex(theirs, ours).exit_code == 1
    assert relex(ours, report(tmp_path / "other.json", BAD)).exit_code == 0
    listed = tmp_path / "listed.json"
    content = json.loads(ours.read_text()) | {"accuracy": 0.75, "standard_error": 0.1, "interval": [0.6, 0.9]}
    listed.write_text(json.dumps([content]))
    assert relex(listed, theirs).exit_code == 0


def test_problems_of_one_cluster_count_less_by_a_column_of_the_rows_or_of_the_problem(tmp_path: Path) -> None:
    """Twenty more of four hundred right, in two of forty texts: of independent problems that would be shown."""
    scores, texts = [float(n < 20) for n in range(400)], [f"text {n // 10}" for n in range(400)]
    ours, theirs = plain(tmp_path / "a.jsonl", scores, text=texts), plain(tmp_path / "b.jsonl", [0.0] * 400)
    assert relex(ours, theirs).exit_code == 0
    judged = relex(ours, theirs, "--cluster", "text")
    assert judged.exit_code == 2, judged.output
    assert "t over 40 clusters" in judged.stdout
    by_subject = [samples(tmp_path / f"{n}.jsonl", {("acc", "none"): each}) for n, each in enumerate((GOOD, BAD))]
    assert "t over 8 clusters" in relex(*by_subject, "--cluster", "subject").stdout


def test_what_cannot_be_compared_is_one_line_and_no_verdict(tmp_path: Path) -> None:
    good = plain(tmp_path / "good.jsonl", GOOD)
    short = plain(tmp_path / "short.jsonl", GOOD[:-1])
    twice = write(
        tmp_path / "twice.jsonl", [{"id": "q0", "score": 1}, {"id": "q1", "score": 1}, {"id": "q0", "score": 0}]
    )
    other = write(tmp_path / "other.jsonl", [{"id": f"p{n}", "score": 1} for n in range(5)])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"id": 1, "score": 1}\n{"id": 2, "sco', encoding="utf-8")
    empty, bytes_ = tmp_path / "empty.jsonl", tmp_path / "bytes.jsonl"
    empty.write_text("")
    bytes_.write_bytes(b"\xff\xfe\x00")
    high = write(tmp_path / "high.jsonl", [{"id": f"q{n}", "score": 7} for n in range(40)])
    nan = write(tmp_path / "nan.jsonl", [{"id": f"q{n}", "score": float("nan")} for n in range(40)])
    strict = samples(tmp_path / "strict.jsonl", {("acc", "strict"): GOOD})
    loose = samples(tmp_path / "loose.jsonl", {("acc", "loose"): GOOD})
    edited = samples(tmp_path / "edited.jsonl", {("acc", "strict"): GOOD}, doc_hash="another")
    lower = samples(tmp_path / "lower.jsonl", {("brier_score", "none"): GOOD})
    reports = report(tmp_path / "r.json", GOOD, dtype="float32"), report(tmp_path / "s.json", GOOD, dtype="bfloat16")
    cases = [
        ((good, short), "good.jsonl has 40 problems and .*short.jsonl 39, 1 only in .*good.jsonl (q39)"),
        ((twice, good), "twice.jsonl: line 3 and line 1 are both of problem q0"),
        ((good, other), "no problem is in both: .* 40, such as q0, q1, q2, …, and .*other.jsonl 5, such as p0"),
        ((good, broken), "broken.jsonl: line 2 is no object with id and score"),
        ((good, empty), "empty.jsonl is empty"),
        ((good, bytes_), "bytes.jsonl cannot be read: it is no text"),
        ((good, tmp_path / "gone.jsonl"), "gone.jsonl cannot be read: No such file or directory"),
        ((good, tmp_path / "nothing"), "nothing has no samples_"),
        ((good, high), "from 7.0 to 7.0 and they must be in 0..1"),
        ((good, nan), "nan.jsonl: line 1 has nan as score of problem q0"),
        ((strict, loose), "no filter is in both: .*strict.jsonl has strict and .*/loose.jsonl loose"),
        ((strict, strict, "--metric", "f1"), "metric f1 is not in both: .* has acc"),
        ((strict, edited), "problem 0 is another in .*strict.jsonl (doc_hash hash 0) than in .*edited.jsonl (another)"),
        ((lower, lower), "metric brier_score of .* is better where it is lower"),
        ((good, good, "--cluster", "text"), "problem q0 has None in column text"),
        (reports, "setting dtype is float32 for .* and bfloat16 for"),
    ]
    (tmp_path / "nothing").mkdir()
    for arguments, message in cases:
        refused = relex(*arguments)
        assert refused.exit_code == 3, (arguments, refused.output)
        (line,) = refused.stderr.splitlines()
        for part in message.split(" .*"):
            assert part.removeprefix(".*") in line, (part, line)
        assert refused.stdout == ""


def test_the_gate_imports_no_library_that_a_light_machine_lacks(tmp_path: Path) -> None:
    pair = plain(tmp_path / "a.jsonl", GOOD), plain(tmp_path / "b.jsonl", BAD)
    program = (
        "import sys; from typer.testing import CliRunner; from flows.cli.main import app;"
        f"status = CliRunner().invoke(app, ['gate', {str(pair[0])!r}, {str(pair[1])!r}]).exit_code;"
        "print(status, *[name for name in ('torch', 'mlflow', 'prefect', 'lm_eval', 'filelock', 'transformers')"
        " if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0"], done.stdout
