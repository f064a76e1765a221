"""Every config that a page or an example shows is accepted, and the reference of settings is that of the code."""

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from docs import reference
from flows.errors import ConfigError
from flows.reground.settings import load_reground_settings
from flows.settings import load_settings
from relex import __version__
from tests.docs.pages import EXAMPLES, PAGES, README, ROOT, blocks, name

BLOCKS = [
    pytest.param(block, id=f"{name(path)}:{number}")
    for path in PAGES
    for number, block in enumerate(blocks(path, "yaml"))
]


def load(path: Path) -> object:
    """Load a config as relex does, by the one of the two kinds that it is."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    return load_reground_settings(path) if "jump_steps" in content else load_settings(path)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_config_that_is_shown_is_accepted(block: str, tmp_path: Path) -> None:
    path = tmp_path / "relex.yaml"
    # Some keys on their own are to be added to the README's.
    path.write_text(blocks(README, "yaml")[0] + block if "training_run" not in block else block)
    load(path)


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_an_example_is_accepted(path: Path) -> None:
    load(path)


def test_there_is_an_example_for_each_kind_of_use() -> None:
    assert {path.stem for path in EXAMPLES} == {"trl", "verl", "auto", "reground"}


def test_the_readme_has_a_config_of_twelve_lines() -> None:
    (block,) = blocks(README, "yaml")
    assert len(block.splitlines()) == 12


def test_what_the_pages_take_from_the_code_is_that_of_the_code() -> None:
    hint = "run python docs/reference.py"
    assert reference.SETTINGS.read_text(encoding="utf-8") == reference.settings(), hint
    assert reference.METHODS_PAGE.read_text(encoding="utf-8") == reference.methods(), hint
    for path, text in reference.schemas().items():
        assert path.read_text(encoding="utf-8") == text, hint


def schema_of(content: dict[str, object]) -> Draft202012Validator:
    texts = {path.name: json.loads(text) for path, text in reference.schemas().items()}
    return Draft202012Validator(texts["reground.schema.json" if "jump_steps" in content else "relex.schema.json"])


@pytest.mark.parametrize("path", EXAMPLES, ids=name)
def test_an_editor_accepts_what_relex_accepts(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    schema_of(content).validate(content)


@pytest.mark.parametrize(
    ("change", "accepted"),
    [
        ({"targets": 200, "methods": "secant", "report": "more.yaml", "memory": "4GiB"}, True),
        ({"targets": "auto", "window": "auto", "methods": "auto", "max_window": 80}, True),
        ({"targets": []}, False),
        ({"targets": "far"}, False),
        ({"windw": 75}, False),
        ({"window": 0}, False),
        ({"pin": "hard"}, False),
    ],
)
def test_an_editor_refuses_what_relex_refuses(change: dict[str, object], accepted: bool, tmp_path: Path) -> None:
    content = yaml.safe_load(blocks(README, "yaml")[0]) | change
    assert schema_of(content).is_valid(content) == accepted
    path = tmp_path / "relex.yaml"
    path.write_text(yaml.safe_dump(content))
    if accepted:
        load(path)
    else:
        with pytest.raises(ConfigError):
            load(path)


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert {"message", "title", "authors"} <= citation.keys()
