"""What the README says is what the project does."""

import re
import shlex
from pathlib import Path

import pytest
import typer.main

from flows.cli.main import app
from flows.reground.settings import load_reground_settings
from flows.settings import load_settings
from relex.predictors import METHODS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def test_continuous_integration_runs_the_test_command_of_the_first_block_and_then_the_rest() -> None:
    first = [shlex.split(line, comments=True) for line in blocks("sh")[0].splitlines()]
    assert first == [["make", "demo"], ["make", "test"]]
    calls = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert calls == ["make test", "make test-rest"]


def test_the_example_config_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "relex.yaml"
    path.write_text(blocks("yaml")[0])
    settings = load_settings(path)
    assert settings.window == 75
    assert settings.selection == str(tmp_path / "benchmarks" / "select.yaml")


def test_the_automatic_example_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "relex.yaml"
    path.write_text(blocks("yaml")[1])
    settings = load_settings(path)
    assert (settings.window, settings.targets, settings.methods) == ("auto", "auto", "auto")
    assert settings.end == 100


def test_the_example_of_re_grounding_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "reground.yaml"
    path.write_text(blocks("yaml")[2])
    assert load_reground_settings(path).jump_steps == 100


@pytest.mark.parametrize("words", [words for words in commands() if words and words[0] == "relex"], ids=" ".join)
def test_every_command_shown_exists_with_its_options(words: list[str]) -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert words[1] in known
    options = {option for parameter in known[words[1]].params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= options


def test_every_method_is_in_the_table_with_its_parameters() -> None:
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\|(.*)\|$", README, re.MULTILINE))
    assert rows.keys() == METHODS.keys()
    for name, row in METHODS.items():
        assert set(re.findall(r"`(\w+)`", rows[name])) == set(row.parameters)
