"""A small YAML is a small value, or it is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from evaluation.benchmarks.task_yaml import read_yaml
from evaluation.errors import BenchmarkError
from evaluation.yaml_text import read_bounded_yaml

LEVELS = "a0: &a0 [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"a{level}: &a{level} [{','.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 13)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 13))
HOSTILE = {
    "twelve levels of aliases": (LEVELS, "its aliases, written out, make more than"),
    "twelve levels of merges": (MERGES, "its aliases, written out, make more than"),
    "a text again and again": (
        f"a: &a {'x' * 100_000}\nb: [{','.join(['*a'] * 100)}]\n",
        "its aliases, written out, make more than",
    ),
    "itself": ("a: &a [*a]\n", "it contains itself"),
    "deep": ("[" * 1000, "it is nested more than 100 deep"),
    "deep and closed": ("[" * 150 + "]" * 150, "it is nested more than 100 deep"),
    "deep by aliases": ("a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 120)), "100 deep"),
    "large": ("a: " + "x" * (1 << 20), "it has more than 1048576 bytes"),
    "a number of 5,000 digits": ("a: " + "9" * 5000, "a number has 5000 digits"),
    "a hexadecimal one": ("a: 0x" + "f" * 5000, "a number has 5002 digits"),
    "a date that is none": ("a: 2001-99-99", "month must be in 1..12"),
    "no text": ("a: \udcff", "utf-8"),
    "a key that is a list": ("? [1]\n: 2\n", "found unhashable key"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE.keys())
def test_what_would_be_large_or_is_no_yaml_is_refused_in_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(yaml.YAMLError, match=said):
        read_bounded_yaml(path)
    with pytest.raises(BenchmarkError, match=rf"^{path} is no readable YAML: .*{said}") as caught:
        read_yaml(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a: 1",
        "a: &a [1, 2]\nb: [*a, *a]\n",
        "base: &b {x: 1}\nown: {<<: *b, y: 2}\n",
        "[" * 99 + "]" * 99,
        "- 2.5\n- null",
    ],
)
def test_everything_else_is_what_the_library_reads(text: str, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(text)
    assert read_bounded_yaml(tmp_path / "task.yaml") == yaml.safe_load(text)


@pytest.mark.timeout(30)
def test_files_that_include_the_same_files_again_and_again_are_refused(tmp_path: Path) -> None:
    for level in range(12):
        includes = [f"{level + 1}.yaml"] * 10 if level < 11 else []
        (tmp_path / f"{level}.yaml").write_text(yaml.safe_dump({"include": includes, "task": "x"}))
    with pytest.raises(BenchmarkError, match=r"0\.yaml includes more than 100 files"):
        read_yaml(tmp_path / "0.yaml")


@pytest.mark.parametrize("include", [5, [5], {"a": 1}, [["a.yaml"]]])
def test_an_include_that_is_no_path_is_refused(include: Any, tmp_path: Path) -> None:
    (tmp_path / "task.yaml").write_text(yaml.safe_dump({"include": include}))
    with pytest.raises(BenchmarkError, match="include must be the path of a YAML"):
        read_yaml(tmp_path / "task.yaml")
