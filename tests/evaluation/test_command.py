"""relex evaluate: what a person reads, and the same for machines."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from evaluation.verdict.report import Evaluated
from flows.cli.evaluate import show_evaluated
from flows.cli.main import app
from tests.helpers.registry import report


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def relex(cache: Path, *arguments: object) -> Result:
    command = ["evaluate", *map(str, arguments), "--cache", str(cache), "--batch-size", "6"]
    return CliRunner().invoke(app, command, env={"COLUMNS": "80"})


def lines(text: str) -> list[str]:
    """Return the lines that say something, runs of blanks as one."""
    return [" ".join(line.split()) for line in text.splitlines() if line.strip()]


def test_the_table_is_lm_evals_with_intervals_and_fits_a_terminal(
    model: Path, benchmark: Path, cache: Path, tmp_path: Path
) -> None:
    shown = relex(cache, model, "--benchmark", benchmark, "--out", tmp_path)
    assert shown.exit_code == 0, shown.output
    head, _, first, second, counted = lines(shown.stdout)
    assert head == "Tasks Version Filter n-shot Metric Value Stderr 95 %"
    assert first == "plus Yaml all 0 exact_match ↑ 0.3333 ± 0.1421 0.1381–0.6094"
    assert second.startswith("all 0 answered ↑ ")
    assert counted.startswith("plus: 12 problems, ")
    assert counted.endswith(" s in the model; 95 %: Wilson")
    assert max(map(len, shown.stdout.splitlines())) <= 80
    written = sorted(tmp_path.rglob("*.json*"))
    assert [path.name.partition("_2")[0] for path in written] == ["results", "samples_plus"]
    assert [line for line in lines(shown.stderr) if line.startswith("wrote")] == [f"wrote {path}" for path in written]

    (report,) = json.loads(relex(cache, model, "--benchmark", benchmark, "--json").stdout)
    assert report["accuracy"] == pytest.approx(1 / 3)
    assert report["interval"] == pytest.approx([0.1381, 0.6094], abs=1e-4)


def test_numbers_stay_whole_however_long_the_names_are(tmp_path: Path) -> None:
    name = "minerva_math_intermediate_algebra"
    results = {
        "results": {name: {"exact_match,flexible-extract": 0.5, "exact_match_stderr,flexible-extract": 0.5}},
        "versions": {name: 1},
        "n-shot": {name: 4},
        "higher_is_better": {name: {"exact_match": True}},
    }
    sample = {"doc_id": 0, "filter": "flexible-extract", "metrics": ["exact_match"]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps(sample | {"exact_match": score}) + "\n" for score in (0.0, 1.0))
    )
    told = io.StringIO()
    evaluated = Evaluated(
        dataclasses.replace(report(1), benchmark=name), tmp_path / "results.json", tmp_path / "samples.jsonl"
    )
    show_evaluated(Console(file=told, width=80), [evaluated])
    assert re.search(r"↑ 0\.5000 ± 0\.5000 0\.\d{4}–0\.\d{4}", told.getvalue())
    assert max(map(len, told.getvalue().splitlines())) <= 80


def test_two_models_are_compared_problem_by_problem(
    model: Path, other_model: Path, benchmark: Path, cache: Path, problems: list[dict[str, str]]
) -> None:
    command = ("--against", model, other_model, "--benchmark", benchmark)
    shown = relex(cache, *command, "--problems", "3", "--margin", "0.2")
    assert shown.exit_code == 0, shown.output
    head, _, row, sentence, *rest = lines(shown.stdout)
    assert head == "benchmark n candidate reference wins losses difference interval"
    assert row.startswith("plus 12 0.3333 0.0000 4 0 +0.3333 -0.01")
    assert f"{model} scores 0.3333 and {other_model} 0.0000" in sentence
    assert "(Tango score, look 1 at plus, 95 % over all looks); a loss of 20 points is ruled out: passed." in sentence
    assert rest[0] == "problem 0 of plus: the candidate is better"
    assert rest[1] == f"prompt {problems[0]['prompt']}"
    answer = " ".join(problems[0]["answer"].split())
    assert rest[2] == f"answer {answer}"
    assert rest[3] == f"candidate 1.00 {answer}"
    assert rest[4].startswith("reference 0.00 ")
    assert [line for line in rest if line.startswith("problem ")] == [
        f"problem {number} of plus: the candidate is better" for number in (0, 3, 6)
    ]
    assert rest[-1] == "1 more problems of plus differ: --problems or --json"

    judged = relex(cache, *command, "--json")
    assert judged.exit_code == 2
    (comparison,) = json.loads(judged.stdout)
    assert (comparison["gate"]["verdict"], comparison["gate"]["margin"]) == ("not shown", 0.0)
    assert comparison["gate"]["sentence"].endswith("would show it with 80 % probability if it stays as it is.")
    assert [each["problem"] for each in comparison["differences"]] == [0, 3, 6, 9]
    assert comparison["differences"][1]["candidate_answers"] == [problems[3]["answer"]]


def test_a_model_is_compared_with_a_stored_result_as_relex_gate_does_it(
    model: Path, other_model: Path, benchmark: Path, cache: Path, tmp_path: Path
) -> None:
    assert relex(cache, other_model, "--benchmark", benchmark, "--out", tmp_path).exit_code == 0
    (stored,) = tmp_path.rglob("samples_*.jsonl")
    command = ("--against", model, stored, "--benchmark", benchmark)
    shown = relex(cache, *command)
    assert shown.exit_code == 2, shown.output
    assert f"On 12 problems of plus, {model} scores 0.3333 and {stored} 0.0000" in shown.stdout
    listed = tmp_path / "report.json"
    listed.write_text(relex(cache, other_model, "--benchmark", benchmark, "--json").stdout)
    judged = relex(cache, "--against", model, listed, "--benchmark", benchmark, "--margin", "0.2", "--json")
    assert (judged.exit_code, json.loads(judged.stdout)["wins"]) == (0, 4)
    stored.write_text("nothing")
    refused = relex(cache, *command)
    assert refused.exit_code == 3
    assert f"{stored}: line 1 is no object" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a", "b"), "2 models are given: one, or two with --against"),
        (("--against", "a"), "1 models are given: one, or two with --against"),
        (("--against", "a", "b", "--logits-from", "c", "--alpha", "2"), "--against is for two directories"),
    ],
)
def test_a_wrong_number_of_models_is_a_usage_error(arguments: tuple[str, ...], message: str, cache: Path) -> None:
    shown = relex(cache, *arguments, "--benchmark", "x")
    assert shown.exit_code == 2
    assert message in " ".join(shown.stderr.replace("│", " ").split())
