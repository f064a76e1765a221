import ast
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from evaluation.benchmarks.task_yaml import ALSO
from evaluation.digest import digest_file
from evaluation.errors import BenchmarkError
from evaluation.problems import load_problems, problem_id

PROBLEMS = [{"prompt": "1+1=", "answer": "2"}, {"prompt": "2+2=", "answer": "4"}]


def test_a_benchmark_is_named_by_its_content_and_not_by_its_place(tmp_path: Path) -> None:
    here = resolve_benchmark(write_benchmark(tmp_path / "here", "sums", PROBLEMS, max_new_tokens=4, stop=["\n"]))
    there = resolve_benchmark(write_benchmark(tmp_path / "there", "sums", PROBLEMS, max_new_tokens=4, stop=["\n"]))
    assert here.name == "sums"
    assert here.generation == {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "samples": 1}
    assert here.digest == there.digest
    assert here.path != there.path


def test_any_change_of_problems_or_settings_is_another_benchmark(tmp_path: Path) -> None:
    variants = [
        write_benchmark(tmp_path / "a", "sums", PROBLEMS, max_new_tokens=4),
        write_benchmark(tmp_path / "b", "sums", PROBLEMS[::-1], max_new_tokens=4),
        write_benchmark(tmp_path / "c", "sums", PROBLEMS, max_new_tokens=5),
        write_benchmark(tmp_path / "d", "sums", PROBLEMS, max_new_tokens=4, stop=["."]),
        write_benchmark(tmp_path / "e", "sums", PROBLEMS, max_new_tokens=4, base="boxed_math"),
        write_benchmark(tmp_path / "f", "sums", PROBLEMS, max_new_tokens=4, order="given"),
    ]
    assert len({resolve_benchmark(path).digest for path in variants}) == len(variants)


def test_a_grading_function_beside_the_yaml_is_part_of_the_benchmark(edited: Callable[[str, str], Path]) -> None:
    path = edited("evaluation.grading.score_exact_match", "marks.score")
    marks = path.parent / "marks.py"
    marks.write_text("def score(problem, results): return {'exact_match': 1.0, 'answered': 1.0}\n")
    before = resolve_benchmark(path).digest
    marks.write_text("def score(problem, results): return {'exact_match': 0.0, 'answered': 1.0}\n")
    assert resolve_benchmark(path).digest != before


def test_writing_the_same_benchmark_again_changes_nothing(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path, "sums", PROBLEMS, max_new_tokens=4)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert write_benchmark(tmp_path, "sums", PROBLEMS, max_new_tokens=4) == path
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before
    with pytest.raises(BenchmarkError, match=r"sums\.jsonl exists and holds another benchmark"):
        write_benchmark(tmp_path, "sums", PROBLEMS[:1], max_new_tokens=4)


def test_changed_data_is_refused_with_both_digests(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path, "sums", PROBLEMS, max_new_tokens=4)
    data = tmp_path / "sums.jsonl"
    data.write_text(data.read_text().replace('"2"', '"3"'))
    with pytest.raises(BenchmarkError, match=r"sums\.jsonl has sha256 [0-9a-f]{64} and .* for [0-9a-f]{64}"):
        resolve_benchmark(path)
    data.unlink()
    with pytest.raises(BenchmarkError, match=r"sums\.jsonl does not exist"):
        resolve_benchmark(path)


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BenchmarkError, match=r"benchmark nonsense is no file, not shipped \(aime_2025, .* and no"):
        resolve_benchmark("nonsense")


@pytest.mark.parametrize("base", ["boxed_math", "exact_match", "paper_greedy", "paper_sampled"])
def test_a_shipped_base_is_a_base_and_no_benchmark(base: str) -> None:
    with pytest.raises(BenchmarkError, match="names no single task"):
        resolve_benchmark(base)


# What errors are called and how the grading process ends decide no grade.
APART = {"evaluation.errors", "evaluation.child"}


def imported(module: str) -> set[str]:
    """Return the modules of this package that a module imports."""
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    nodes = ast.walk(ast.parse(Path(spec.origin).read_text()))
    names = {
        f"{node.module}.{alias.name}"
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "evaluation"
        for alias in node.names
    }
    return {name if is_module(name) else name.rpartition(".")[0] for name in names}


def is_module(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_a_grade_is_named_by_all_that_decides_it() -> None:
    # What grading imports of this package, but for the errors and its own digest.
    for module, others in ALSO.items():
        used, new = set(), {module}
        while new:
            used |= new
            new = {name for each in new for name in imported(each)} - used - APART
        assert used == {module, *others}


def test_a_problem_keeps_every_kind_of_line_end_inside_it(tmp_path: Path) -> None:
    problems = [{"prompt": "a\u2028b\x85c\u2029d\n", "answer": "1"}, {"prompt": "e", "answer": "2"}]
    path = write_benchmark(tmp_path, "ends", problems, max_new_tokens=4, order="given")
    config = yaml.safe_load(path.read_text().replace("!function ", ""))
    loaded = load_problems(config_source=str(path), **config["dataset_kwargs"])
    assert loaded["test"].to_list() == problems


def loaded(path: Path, **other: Any) -> dict[str, list[dict[str, str]]]:
    """Return what lm-eval is given of a benchmark's YAML."""
    config = yaml.safe_load(path.read_text().replace("!function ", ""))
    splits = load_problems(config_source=str(path), **config["dataset_kwargs"] | other)
    return {split: rows.to_list() for split, rows in splits.items()}


def test_the_first_problems_are_a_sample_of_all_and_not_the_first_subject(tmp_path: Path) -> None:
    subjects = [{"prompt": f"{subject} {number}", "answer": "1"} for subject in "abcd" for number in range(50)]
    asked = loaded(write_benchmark(tmp_path / "hash", "sums", subjects, max_new_tokens=4))["test"]
    assert asked != subjects
    assert sorted(asked, key=problem_id) == asked
    assert sorted(asked, key=str) == sorted(subjects, key=str)
    first = Counter(problem["prompt"][0] for problem in asked[:40])
    assert min(first[subject] for subject in "abcd") >= 4
    # Whatever the order of the file.
    assert loaded(write_benchmark(tmp_path / "other", "sums", subjects[::-1], max_new_tokens=4))["test"] == asked
    kept = write_benchmark(tmp_path / "given", "sums", subjects, max_new_tokens=4, order="given")
    assert loaded(kept)["test"] == subjects


def test_examples_keep_the_order_of_their_file_and_an_unknown_order_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": str(number), "answer": "1"} for number in range(20)]
    path = write_benchmark(tmp_path, "sums", rows, max_new_tokens=4)
    sha256 = digest_file(tmp_path / "sums.jsonl")
    both = {"data": {"train": "sums.jsonl", "validation": "sums.jsonl"}}
    splits = loaded(path, **both, sha256={"train": sha256, "validation": sha256}, asked="validation")
    assert splits == {"train": rows, "validation": sorted(rows, key=problem_id)}
    with pytest.raises(BenchmarkError, match="has order random and must be hash or given"):
        loaded(path, order="random")


@pytest.mark.parametrize(
    ("data", "sha256"), [({"test": "a"}, "b"), ({"test": "a"}, {"train": "b"}), ("a", {"test": "b"})]
)
def test_data_and_digests_that_do_not_belong_together_are_refused(data: Any, sha256: Any) -> None:
    with pytest.raises(BenchmarkError, match="give both once, or both for each split"):
        load_problems("x.yaml", data, sha256)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", "is no readable YAML: while parsing .* line 1"),
        ("- a", "holds a list and must hold"),
        ("doc_to_text: x", r"names no single task \(task is None\)"),
        ("group: g\ntask: [a, b]", r"names no single task \(task is \['a', 'b'\]\)"),
        ("task: t\noutput_type: essay", "has output_type essay and lm-eval knows generate_until"),
        ("task: t\ninclude: absent.yaml", r"absent\.yaml is no readable YAML: .*No such file"),
        ("task: t\ninclude: broken.yaml", r"broken\.yaml includes itself"),
        ("task: t\ncustom_dataset: !function evaluation.problems.load_problems", "needs dataset_kwargs"),
        ("task: t\nprocess_results: !function evaluation.nothing.score", r"there is no module evaluation\.nothing"),
    ],
)
def test_a_broken_yaml_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    with pytest.raises(BenchmarkError, match=message) as refusal:
        resolve_benchmark(path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        ([], "has no problems"),
        ([{"prompt": "1+1="}], "problem 1 of sums needs a prompt and an answer"),
        ([*PROBLEMS, {"prompt": " ", "answer": "2"}], "problem 3 of sums needs"),
        ([*PROBLEMS, PROBLEMS[0]], "problems 1 and 3 of sums are the same"),
    ],
)
def test_unfit_problems_are_refused_and_nothing_is_left(
    tmp_path: Path, problems: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        write_benchmark(tmp_path / "benchmarks", "sums", problems, max_new_tokens=4)
    assert not (tmp_path / "benchmarks").exists()


def test_a_name_that_is_a_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"'\.\./sums' cannot name a benchmark"):
        write_benchmark(tmp_path, "../sums", PROBLEMS, max_new_tokens=4)


def test_a_file_says_itself_that_it_is_asked_in_a_chat_template(tmp_path: Path) -> None:
    path = write_benchmark(tmp_path, "sums", PROBLEMS, max_new_tokens=4)
    with pytest.raises(BenchmarkError, match=r"sums\.yaml is a file: ask in the model's chat template by metadata"):
        resolve_benchmark(f"{path}@chat")
