"""The pages hang together: links, anchors, names of the code, the table of methods, the example of a method."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flows.cli.main import main
from relex import predictors
from relex.predictors import METHODS
from tests.docs.pages import PAGES, README, ROOT, anchors, blocks, links, name, paragraphs, prose

METHODS_PAGE = ROOT / "docs" / "methods.md"
DESIGN_PAGE = ROOT / "docs" / "design.md"
LINKS = [pytest.param(path, link, id=f"{name(path)}: {link}") for path in PAGES for link in links(path)]


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page: Path, link: str) -> None:
    if link.startswith("https://"):
        return
    place, _, anchor = link.partition("#")
    target = (page.parent / place).resolve() if place else page
    assert target.is_relative_to(ROOT)
    assert target.exists()
    if anchor:
        assert anchor in anchors(target)


def test_every_page_of_the_site_is_linked_from_the_readme_and_in_the_contents() -> None:
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    (contents,) = blocks(ROOT / "docs" / "index.md", "{toctree}")
    assert set(contents.split()) - {":hidden:"} == pages
    assert pages == {Path(link).stem for link in links(README) if link.startswith("docs/") and link.endswith(".md")}


def test_the_readme_has_at_most_150_lines() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_a_paragraph_has_at_most_80_words(path: Path) -> None:
    for paragraph in paragraphs(path):
        assert len(paragraph.split()) <= 80, paragraph


# Written by the reader of a page, or by somebody's deployment.
MADE = {"relex/predictors/chord.py", "deploy/.env"}
EVENTS = {
    *("relex.checkpoint.ready", "relex.window.ready", "relex.target.reached", "relex.prediction.drifted"),
    "relex.training",
    # A tag that people set in MLflow.
    "relex.insist",
}


def names_of_the_code() -> list[Any]:
    pattern = re.compile(r"\b((?:relex|evaluation|deploy|flows)(?:\.\w+)+)")
    collected = []
    for path in PAGES:
        # Files and events are written with dots, too.
        words = re.findall(r"`([^`\n]+)`", prose(path))
        words += [line for block in blocks(path, "python") for line in block.splitlines()]
        dotted = {match for word in words for match in pattern.findall(word)}
        events = {
            f"relex.{end}" for end in ("checkpoint.ready", "window.ready", "target.reached", "prediction.drifted")
        }
        events.add("relex.training")
        collected += [
            pytest.param(word, id=f"{name(path)}: {word}")
            for word in sorted(dotted - EVENTS)
            if not word.endswith((".yaml", ".json", ".md"))
        ]
    return collected


@pytest.mark.parametrize("dotted", names_of_the_code())
def test_a_name_of_the_code_exists(dotted: str) -> None:
    package, _, last = dotted.rpartition(".")
    try:
        importlib.import_module(dotted)
    except ModuleNotFoundError:
        assert hasattr(importlib.import_module(package), last)


def test_every_folder_of_the_layout_exists() -> None:
    tree = next(block for block in blocks(DESIGN_PAGE, "text") if block.startswith("flows/"))
    parent, folders = "", []
    for line in tree.splitlines():
        indent, entry = re.match(r"( *)((?:[\w/]+/(?:, )?)+)", line).groups()  # type: ignore[union-attr]
        for folder in entry.split(", "):
            folders.append(f"{parent if indent else ''}{folder}")
        parent = parent if indent else entry
    assert not [folder for folder in folders if not (ROOT / folder).is_dir()]
    for package in ("flows", "relex", "evaluation", "deploy"):
        real = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
        assert real <= {Path(folder).name for folder in folders if folder.startswith(f"{package}/")}


def test_every_method_is_in_the_table_with_its_parameters() -> None:
    text = METHODS_PAGE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \|[^|]*\|([^|]*)\|", text, re.MULTILINE))
    assert rows.keys() == METHODS.keys()
    for method, row in METHODS.items():
        assert set(re.findall(r"(\w+)=", rows[method])) == set(row.parameters)


def test_the_method_that_is_written_as_an_example_needs_its_file_and_its_row(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (source,) = blocks(METHODS_PAGE, "python")
    module: dict[str, Any] = {"__name__": "chord"}
    exec(compile(source, "chord.py", "exec"), module)
    (row,) = [block for block in blocks(METHODS_PAGE, "text") if "Row(" in block]
    monkeypatch.setattr(predictors, "METHODS", {**METHODS, **eval(f"{{{row}}}", {"Row": predictors.Row, **module})})
    # Along a line in the step, which begins at 5.0 and not at the base, so that RELEX would miss it.
    for step in (0, 10, 20, 25, 40, 75):
        path = tmp_path / ("base" if step == 0 else f"run/checkpoint-{step}")
        path.mkdir(parents=True)
        weight = torch.full((4, 3), 5.0 + step if step else 0.0)
        save_file({"model.weight": weight}, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text("{}")
        (path / "trainer_state.json").write_text("{}")

    def relex(spec: str) -> int | str | None:
        words = ["extrapolate", tmp_path / "run", "--base", tmp_path / "base", "--target-step", 500, "--method", spec]
        words += ["--out", tmp_path / spec.replace(":", "-"), "--cache", tmp_path / "cache"]
        monkeypatch.setattr(sys, "argv", ["relex", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return left.value.code

    for spec in ("chord", "chord:back=4"):
        assert relex(spec) == 0
        written = load_file(tmp_path / spec.replace(":", "-") / "step-500" / "model.safetensors")
        assert float(written["model.weight"].mean()) == pytest.approx(505.0)
    assert relex("chord:back=5") == 1
    assert "back is 5, and the window has 5 checkpoints. Give 1 to 4." in capsys.readouterr().err
    assert "chord (back=1)" in predictors.option_help()


def files_of_the_code() -> list[Any]:
    pattern = re.compile(r"`((?:relex|evaluation|deploy|flows|tests|docs|examples|benchmarks)/[\w./-]*)`")
    return [
        pytest.param(each, id=f"{name(path)}: {each}")
        for path in PAGES
        for each in sorted(set(pattern.findall(prose(path))) - MADE)
    ]


@pytest.mark.parametrize("place", files_of_the_code())
def test_a_file_that_is_named_exists(place: str) -> None:
    assert (ROOT / place).exists()


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_python_blocks_are_python(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block, str(path), "exec")
