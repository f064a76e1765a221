"""What lies beside a report is what lm-eval's own command line writes of the same model and problems."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from evaluation.answers.fingerprint import fingerprint
from evaluation.answers.harness import Progress, evaluate
from evaluation.errors import ReportError
from evaluation.verdict.export import export, read_rows
from evaluation.verdict.report import Evaluated

METRICS = ("exact_match", "answered")


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model without sampling settings, which lm-eval would score it with."""
    copy = Path(shutil.copytree(model, tmp_path_factory.mktemp("models") / "plain"))
    (copy / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}))
    return copy


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def progress() -> list[Progress]:
    return []


@pytest.fixture(scope="module")
def ours(plain: Path, benchmark: Path, cache: Path, progress: list[Progress]) -> Evaluated:
    (evaluated,) = evaluate(
        plain, [benchmark], cache=cache, batch_size=5, limit=8, details=True, on_progress=progress.append
    )
    return evaluated


@pytest.fixture(scope="module")
def theirs(plain: Path, benchmark: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory that lm-eval fills when it scores the same problems itself."""
    directory = tmp_path_factory.mktemp("lm-eval")
    tracker = EvaluationTracker(output_path=str(directory))
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(plain)},
        tasks=[str(benchmark)],
        task_manager=TaskManager(include_defaults=False),
        num_fewshot=0,
        batch_size=5,
        device="cpu",
        limit=8,
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results, samples)
    tracker.save_results_samples("plus", samples["plus"])
    return directory


def written(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return results and samples of the one model in a directory."""
    (results,) = directory.glob("*/results_*.json")
    (samples,) = directory.glob("*/samples_plus_*.jsonl")
    return json.loads(results.read_text()), list(map(json.loads, samples.read_text().splitlines()))


def shape(content: object) -> object:
    """Return the keys of nested objects, without what they hold."""
    if isinstance(content, Mapping):
        return {key: shape(value) for key, value in content.items()}
    return None


def test_exported_files_have_the_names_and_keys_and_numbers_of_lm_evals_own(
    ours: Evaluated, theirs: Path, tmp_path: Path
) -> None:
    export([ours], tmp_path)
    results, samples = written(tmp_path)
    expected_results, expected_samples = written(theirs)
    # lm-eval keeps arguments of its model loader that are not ours.
    for content in (results, expected_results):
        del content["config"]["model_args"]
    assert shape(results) == shape(expected_results)
    for name in ("results", "n-samples", "n-shot", "versions", "higher_is_better", "task_hashes"):
        assert results[name] == expected_results[name]
    assert results["results"]["plus"]["exact_match,all"] == ours.report.accuracy
    assert results["results"]["plus"]["exact_match_stderr,all"] == pytest.approx(ours.report.standard_error)
    # Its generation arguments arrive with defaults that lm-eval fills in later.
    assert [shape(each) for each in samples] == [shape(each) for each in expected_samples]
    for name in ("doc", "doc_hash", "prompt_hash", "target", "resps", "filtered_resps", "exact_match"):
        assert [each[name] for each in samples] == [each[name] for each in expected_samples]
    (mine,), (its,) = tmp_path.iterdir(), theirs.iterdir()
    assert mine.name == its.name


def test_several_benchmarks_are_one_results_file(ours: Evaluated, tmp_path: Path) -> None:
    other = json.loads(ours.results.read_text().replace('"plus"', '"minus"'))
    (tmp_path / "minus.json").write_text(json.dumps(other))
    renamed = Evaluated(ours.report, tmp_path / "minus.json", ours.samples)
    paths = export([ours, renamed], tmp_path / "out")
    assert len(paths) == 3
    merged = json.loads(paths[0].read_text())
    assert [*merged["results"]] == [*merged["versions"]] == [*merged["task_hashes"]] == ["plus", "minus"]
    assert merged["total_evaluation_time_seconds"] == str(2 * ours.report.seconds)


def test_rows_have_every_metric_with_its_interval(ours: Evaluated) -> None:
    rows = read_rows(ours)
    assert [(row.task, row.filter, row.n_shot, row.metric, row.higher_is_better) for row in rows] == [
        ("plus", "all", "0", metric, True) for metric in METRICS
    ]
    assert rows[0].value == ours.report.accuracy
    assert rows[0].interval == ours.report.interval
    assert rows[0].stderr == pytest.approx(ours.report.standard_error)


def test_an_older_cache_gets_its_details_from_the_journal(
    ours: Evaluated, plain: Path, benchmark: Path, cache: Path
) -> None:
    before = ours.samples.read_text()
    journal = next(cache.glob("plus-*/journal.jsonl")).read_bytes()
    ours.samples.unlink()
    # The report alone needs no child, whose log would be written.
    stamp = ours.report.benchmark_digest, next(cache.glob("plus-*/worker.log")).stat().st_mtime_ns
    assert evaluate(plain, [benchmark], cache=cache, batch_size=5, limit=8) == [ours]
    assert not ours.samples.exists()
    assert (ours.report.benchmark_digest, next(cache.glob("plus-*/worker.log")).stat().st_mtime_ns) == stamp
    assert evaluate(plain, [benchmark], cache=cache, batch_size=5, limit=8, details=True) == [ours]
    assert ours.samples.read_text() == before
    assert next(cache.glob("plus-*/journal.jsonl")).read_bytes() == journal
    assert not list(cache.glob("plus-*/.details"))


def test_progress_tells_pace_and_what_remains(ours: Evaluated, progress: list[Progress]) -> None:
    assert [(step.done, step.total, step.generated) for step in progress] == [(5, 8, 5), (8, 8, 8)]
    first, last = progress
    assert 0 < first.seconds < last.seconds <= ours.report.seconds + 1e-9
    assert 5 <= first.tokens < last.tokens <= 8 * 40
    assert first.remaining == pytest.approx(3 * first.seconds / 5)
    assert last.remaining == 0
    assert first.pace.endswith(" tokens/s")
    assert Progress("plus", 5, 8).remaining is None
    assert Progress("plus", 5, 8).pace == ""


def test_results_that_cannot_be_read_are_named(ours: Evaluated, tmp_path: Path) -> None:
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ReportError, match=r"torn\.json cannot be read"):
        export([Evaluated(ours.report, tmp_path / "torn.json", ours.samples)], tmp_path / "out")


def test_a_model_is_named_by_where_it_lies_now(ours: Evaluated, plain: Path, tmp_path: Path) -> None:
    moved = Evaluated(
        ours.report.__class__(**{**vars(ours.report), "model": "/elsewhere/copy"}), ours.results, ours.samples
    )
    (first, _) = export([moved], tmp_path)
    assert json.loads(first.read_text())["model_name"] == "/elsewhere/copy"
    assert first.parent.name == "__elsewhere__copy"
    assert json.loads(first.read_text())["config"]["model_sha"] == fingerprint(plain).digest
