"""Every command that a page shows can be typed: the program, the command, its options and the files that it names."""

import re
import subprocess
import tomllib
from functools import cache
from pathlib import Path

import pytest
import typer.main

from flows.cli.main import app
from tests.docs.pages import EXAMPLES, PAGES, README, ROOT, blocks, commands, name, shell_lines

SHOWN = [
    pytest.param(words, id=f"{name(path)}: {' '.join(words)}")
    for path in (*PAGES, *EXAMPLES)
    for line in shell_lines(path)
    for words in commands(line)
]
# Programs of others; what follows them is only looked at as far as it names files of this repository.
OTHERS = {".", "umask", "echo", "pytest", "ruff", "mypy", "lint-imports", "prefect", "dask", "docker"}


@cache
def known_commands() -> dict[str, set[str]]:
    """Return the options of every command of `relex`, by the words that call it: all that depends on the library."""
    options: dict[str, set[str]] = {}

    def collect(group: object, before: tuple[str, ...]) -> None:
        for word, command in group.commands.items():  # type: ignore[attr-defined]
            words = (*before, word)
            options[" ".join(words)] = {option for parameter in command.params for option in parameter.opts} | {
                "--help"
            }
            if hasattr(command, "commands"):
                collect(command, words)

    collect(typer.main.get_command(app), ())
    return options


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check_relex(words: list[str]) -> None:
    # What stands behind -- is the engine's.
    own = words[1 : words.index("--")] if "--" in words else words[1:]
    known = known_commands()
    command = next((text for text in (" ".join(own[:2]), own[0]) if text in known), None)
    assert command is not None, f"relex has no command {own[0]}"
    given = {word.partition("=")[0] for word in own if word.startswith("--")}
    assert given <= known[command], f"relex {command} has no {', '.join(sorted(given - known[command]))}"


def check_python(words: list[str]) -> None:
    script = ROOT / (f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1])
    text = script.read_text(encoding="utf-8")
    for option in (word for word in words if word.startswith("--")):
        assert f'add_argument("{option}"' in text, f"{script} has no {option}"


def check_pip(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert words[:2] == ["pip", "install"]
    installed = re.fullmatch(rf"{project['name']}(?:\[([\w,]+)\])?", " ".join(words[2:]))
    assert installed, "only relex is installed by hand"
    assert set((installed[1] or "all").split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("words", SHOWN)
def test_a_command_that_is_shown_can_be_typed(words: list[str]) -> None:
    match words[0]:
        case "relex":
            check_relex(words)
        case "make":
            assert set(words[1:]) <= make_targets()
        case "python":
            check_python(words)
        case "pip":
            check_pip(words)
        case program:
            assert program in OTHERS, f"{program} is no program that these tests know"
    named = [word for word in words[1:] if word.startswith(("deploy/", "tests/", "examples/", "docs/"))]
    missing = [word for word in named if not (ROOT / word).exists()]
    assert not missing


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_shell_blocks_are_shell(path: Path) -> None:
    for block in blocks(path, "sh"):
        checked = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert checked.returncode == 0, checked.stderr


def test_the_readme_has_a_row_for_every_command() -> None:
    rows = re.findall(r"^\| `relex ([a-z ]+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(known_commands())


def test_every_option_that_prose_names_exists() -> None:
    every = {option for options in known_commands().values() for option in options}
    # Other programs' options: dask's, docker's, trainers', pip's and the engine's.
    others = {"--nthreads", "--max-model-len", "--save-hf", "--ckpt.save_hf", "--cold", "--cache", "--two-passes"}
    for path in PAGES:
        text = path.read_text(encoding="utf-8")
        shown = {match for code in re.findall(r"`(--[^`]*)`", text) for match in re.findall(r"--[\w.-]+", code)}
        assert shown <= every | others, f"{name(path)}: {sorted(shown - every - others)}"


def test_continuous_integration_begins_with_the_test_command_of_the_readme() -> None:
    first = [words for line in blocks(README, "sh")[0].splitlines() for words in commands(line)]
    assert first == [["make", "demo"], ["make", "test"]]
    calls = [line.split("#")[0].split() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    called = [words for words in calls if words[:1] == ["make"]]
    assert called[0] == ["make", "test"]
    assert {target for words in called for target in words[1:]} <= make_targets()
