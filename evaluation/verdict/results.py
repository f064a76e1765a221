"""Result: the scores that one file holds of one model, whoever wrote it, and two of them paired by problem.

A report or the samples of relex, samples_*.jsonl of lm-eval, or JSONL with an `id` and a `score` a line. Of a directory
all samples_*.jsonl below it are one result, a task each, as lm-eval writes a group of tasks.
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from evaluation.errors import ComparisonError, ReportError
from evaluation.problems import problem_id
from evaluation.verdict.gate import Gate, gate
from evaluation.verdict.report import Report, Setting

Row = Mapping[str, Any]

# Of lm-eval's metrics with a number a problem: where lower is better.
LOWER_IS_BETTER = frozenset({"brier_score", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "ter"})
# Numbers beside the metrics in samples of an lm-eval that does not list them.
_NO_METRICS = frozenset({"doc_id"})
# The column of a result of several tasks that has the task.
TASK = "task"
_SAMPLES = re.compile(r"samples_(?P<task>.+?)_\d{4}-\d\d-\d\dT[\d.-]+\.jsonl")
# Of problems that only one of two results has.
_SHOWN = 3


@dataclass(frozen=True)
class Result:
    """The rows of one file; `name` is what a sentence calls it, `report` is there where it is one.

    `metrics` and `filters` are what may be chosen, in the file's order; plain rows have neither.
    """

    name: str
    kind: Literal["report", "samples", "plain"]
    rows: tuple[Row, ...]
    metrics: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    benchmark: str = ""
    report: Report | None = None


@dataclass(frozen=True)
class Compared:
    """The verdict on two results, by which metric and filter, and what others there were where none was asked for."""

    gate: Gate
    metric: str
    filter: str
    other_metrics: tuple[str, ...] = ()
    other_filters: tuple[str, ...] = ()

    @property
    def choice(self) -> str:
        """Return what was compared in words, and how to take another; empty where there was no choice."""
        parts = [f"{self.metric}{f' after filter {self.filter}' if self.other_filters else ''} is compared"]
        for option, others in (("--metric", self.other_metrics), ("--filter", self.other_filters)):
            if others:
                parts.append(f"{option} takes {' or '.join(others)}")
        return "; ".join(parts) if len(parts) > 1 else ""


def read_result(path: Path, *, name: str = "", benchmark: str = "") -> Result:
    """Return what `path` holds; ReportError, with the line, where it is none of the kinds or cannot be read.

    A sentence calls it `name` and its problems `benchmark`, by default as the file is called.
    """
    name = name or str(path)
    if path.is_dir():
        return _directory(path, name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ReportError(f"{path} cannot be read: {reason}. Give a report, samples_*.jsonl, or JSONL.") from error
    report = _report(text, path)
    if report is not None:
        return result_of(replace(report, model=name))
    rows = tuple(_rows(text, path))
    if "score" in rows[0]:
        return Result(name, "plain", rows, benchmark=path.stem)
    return _samples(rows, name, path, benchmark=benchmark)


def result_of(report: Report) -> Result:
    """Return the result that a report is, by the name of its model."""
    scores = tuple({"id": problem, "score": score} for problem, score in report.scores)
    return Result(report.model, "report", scores, (report.metric,), (), report.benchmark, report)


def compare(
    ours: Result,
    theirs: Result,
    *,
    margin: float = 0.0,
    confidence: float = 0.95,
    metric: str | None = None,
    filter_name: str | None = None,
    cluster: str | None = None,
) -> Compared:
    """Return whether the first result is shown to be better than the second, or worse, problem by problem.

    Without a `metric` or `filter_name` the first is taken that both have. `cluster` is a column of the rows, or of the
    problems in samples. Raises ComparisonError where they are not of the same problems, or an id stands twice.
    """
    chosen, other_metrics = _choose("metric", metric, ours, theirs, lambda result: result.metrics)
    after, other_filters = _choose("filter", filter_name, ours, theirs, lambda result: result.filters)
    if chosen in LOWER_IS_BETTER:
        raise ComparisonError(f"metric {chosen} of {ours.name} is better where it is lower: take another by --metric.")
    # A report knows its problems by their content.
    by_content = {ours.kind, theirs.kind} == {"report", "samples"}
    first, second = (
        _table(result, metric=chosen, filter_name=after, by_content=by_content) for result in (ours, theirs)
    )
    _refuse_others(first, second)
    clusters = None if cluster is None else _clusters(first, second, cluster)
    return Compared(
        gate(
            _scored(first, chosen, ours.benchmark, settings=theirs.report is not None),
            _scored(second, chosen, ours.benchmark, settings=ours.report is not None, order=[*first.rows]),
            margin=margin,
            confidence=confidence,
            clusters=clusters,
        ),
        chosen,
        after,
        other_metrics,
        other_filters,
    )


@dataclass(frozen=True)
class _Table:
    """The rows that count of one result, by problem."""

    result: Result
    rows: dict[str, Row] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)


def _directory(path: Path, name: str) -> Result:
    files: dict[str, Path] = {}
    for each in sorted(path.rglob("samples_*.jsonl")):
        named = _SAMPLES.fullmatch(each.name)
        task = named["task"] if named else each.stem.removeprefix("samples_")
        if task in files:
            raise ReportError(f"{path} has two results of {task}, {files[task].name} and {each.name}: give one file.")
        files[task] = each
    if not files:
        raise ReportError(f"{path} has no samples_*.jsonl in it: give lm-eval's --log_samples, or a file.")
    parts = {task: read_result(each) for task, each in files.items()}
    rows = tuple(
        {**row, "doc_id": f"{task} {row.get('doc_id')}" if len(files) > 1 else row.get("doc_id"), TASK: task}
        for task, part in parts.items()
        for row in part.rows
    )
    return _samples(rows, name, path, benchmark=" and ".join(files) if len(files) < _SHOWN else f"{len(files)} tasks")


def _report(text: str, path: Path) -> Report | None:
    """Return the report that the text is: relex's own, or what `relex evaluate --json` prints of one benchmark."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    if isinstance(content, list):
        if len(content) != 1:
            raise ReportError(f"{path} holds {len(content)} reports and one is compared: give each a file of its own.")
        (content,) = content
    if not isinstance(content, dict) or "scores" not in content:
        return None
    for derived in ("accuracy", "standard_error", "interval"):
        content.pop(derived, None)
    try:
        return Report.from_json(json.dumps(content))
    except ReportError as error:
        raise ReportError(f"{path}: {error}") from error


def _rows(text: str, path: Path) -> Iterator[Row]:
    # Not splitlines: a text may hold U+2028, which JSON leaves as it is.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise ReportError(f"{path} is empty: give a report, samples_*.jsonl, or JSONL with an id and a score a line.")
    kinds = (("id", "score"), ("doc_id",))
    for number, line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not any(all(key in row for key in kind) for kind in kinds):
            raise ReportError(
                f"{path}: line {number} is no object with id and score, nor with doc_id as lm-eval writes it: give a"
                " report, samples_*.jsonl, or JSONL."
            )
        yield {**row, "line": number}


def _samples(rows: Sequence[Row], name: str, path: Path, *, benchmark: str = "") -> Result:
    named = _SAMPLES.fullmatch(path.name)
    listed = rows[0].get("metrics")
    metrics = listed if isinstance(listed, list) else [key for key in rows[0] if key not in {*_NO_METRICS, "line"}]
    numbers = [str(metric) for metric in metrics if isinstance(rows[0].get(metric), int | float)]
    if not numbers:
        raise ReportError(
            f"{path} has no metric with a number a problem in line 1, but {metrics}: evaluate by another."
        )
    return Result(
        name,
        "samples",
        tuple(rows),
        tuple(numbers),
        tuple(dict.fromkeys(str(row.get("filter", "none")) for row in rows)),
        benchmark or (named["task"] if named else path.stem),
    )


def _choose(
    what: str, given: str | None, ours: Result, theirs: Result, choices: Callable[[Result], tuple[str, ...]]
) -> tuple[str, tuple[str, ...]]:
    """Return which metric or filter is compared, and the others that both have; rows of no choice fit any."""
    first, second = choices(ours), choices(theirs)
    shared = [each for each in first if each in second or not second] or ([*second] if not first else [])
    has = f"{ours.name} has {', '.join(first) or 'none'} and {theirs.name} {', '.join(second) or 'none'}"
    if given is not None:
        if given not in shared:
            raise ComparisonError(f"{what} {given} is not in both: {has}. Give one of both by --{what}.")
        return given, ()
    if not first and not second:
        return "score", ()
    if not shared:
        raise ComparisonError(f"no {what} is in both: {has}. Evaluate both by one.")
    return shared[0], tuple(shared[1:])


def _table(result: Result, *, metric: str, filter_name: str, by_content: bool) -> _Table:
    table = _Table(result)
    for row in result.rows:
        if result.kind == "samples" and str(row.get("filter", "none")) != filter_name:
            continue
        line = f"{result.name}: line {row['line']}" if "line" in row else result.name
        problem = _id(row, result, line, by_content=by_content)
        if problem in table.rows:
            before = f" and line {table.rows[problem]['line']}" if "line" in row else ""
            raise ComparisonError(
                f"{line}{before} are both of problem {problem}: leave one, or give their mean as its score."
            )
        value = row.get(metric if result.kind == "samples" else "score")
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ComparisonError(
                f"{line} has {value!r} as {metric} of problem {problem}, no number: evaluate it again."
            )
        table.rows[problem], table.scores[problem] = row, float(value)
    return table


def _id(row: Row, result: Result, line: str, *, by_content: bool) -> str:
    if result.kind == "samples" and by_content:
        if not isinstance(row.get("doc"), dict):
            raise ComparisonError(f"{line} has no doc to know the problem by: give samples of both, no report.")
        return problem_id(row["doc"])
    value = row["doc_id" if result.kind == "samples" else "id"]
    if not isinstance(value, str | int):
        raise ComparisonError(f"{line} has {value!r} as its id, neither text nor number: give each problem an id.")
    return str(value)


def _refuse_others(first: _Table, second: _Table) -> None:
    ours, theirs = first.result.name, second.result.name
    only = [[problem for problem in a.rows if problem not in b.rows] for a, b in ((first, second), (second, first))]
    if len(only[0]) == len(first.rows):
        raise ComparisonError(
            f"no problem is in both: {ours} has {len(first.rows)}, such as {_some(only[0])}, and {theirs}"
            f" {len(second.rows)}, such as {_some(only[1])}: give two results of one benchmark."
        )
    if any(only):
        said = [
            f"{len(each)} only in {name} ({_some(each)})"
            for each, name in zip(only, (ours, theirs), strict=True)
            if each
        ]
        raise ComparisonError(
            f"{ours} has {len(first.rows)} problems and {theirs} {len(second.rows)}, {' and '.join(said)}: score both"
            " on the same problems."
        )
    for problem, row in first.rows.items():
        a, b = row.get("doc_hash"), second.rows[problem].get("doc_hash")
        if a is not None and b is not None and a != b:
            raise ComparisonError(
                f"problem {problem} is another in {ours} (doc_hash {str(a)[:12]}) than in {theirs} ({str(b)[:12]}):"
                " score both on the same version of the benchmark."
            )


def _some(problems: Sequence[str]) -> str:
    return ", ".join(problems[:_SHOWN]) + (", …" if len(problems) > _SHOWN else "")


def _clusters(first: _Table, second: _Table, column: str) -> list[str]:
    clusters = []
    for problem, row in first.rows.items():
        ours, theirs = _cell(row, column), _cell(second.rows[problem], column)
        value = theirs if ours is None else ours
        if not isinstance(value, str | int):
            raise ComparisonError(
                f"problem {problem} has {value!r} in column {column}, in {first.result.name} as in"
                f" {second.result.name}: give --cluster a column of texts or numbers that every problem has."
            )
        if theirs is not None and value != theirs:
            raise ComparisonError(
                f"problem {problem} is of {column} {value} in {first.result.name} and of {theirs} in"
                f" {second.result.name}: give both the same clusters."
            )
        clusters.append(str(value))
    return clusters


def _cell(row: Row, column: str) -> Any:
    doc = row.get("doc")
    return row[column] if column in row else doc.get(column) if isinstance(doc, dict) else None


def _scored(
    table: _Table, metric: str, benchmark: str, *, settings: bool, order: Sequence[str] | None = None
) -> Report:
    """Return the scores as a report, in `order`; with `settings` it keeps those of the report that it is."""
    report, problems = table.result.report, [*table.rows] if order is None else order
    kept: Mapping[str, Setting] = report.settings if report is not None and settings else {}
    return Report(
        model=table.result.name,
        model_digest="",
        benchmark=report.benchmark if report is not None and settings else benchmark,
        benchmark_digest=report.benchmark_digest if report is not None and settings else "",
        metric=metric,
        scores=tuple((problem, table.scores[problem]) for problem in problems),
        rates={},
        settings=kept,
        seconds=0.0,
    )
