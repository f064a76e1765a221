"""Started where a user has packages that are named like ours, relex imports its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.local import server
from deploy.local.own_code import for_the_user, own_code
from deploy.local.stack import Stack, environment
from evaluation.child import run_child
from evaluation.grading.equality import Comparer

NAMES = ("flows", "evaluation", "deploy", "relex")


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory one is in: packages that leave a file behind when they are imported."""
    for name in NAMES:
        package = tmp_path / "mine" / name
        package.mkdir(parents=True)
        imported = tmp_path / f"imported-{name}"
        (package / "__init__.py").write_text(f"open({str(imported)!r}, 'w').close()\n")
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def imported(foreign: Path) -> list[str]:
    return sorted(path.name for path in foreign.parent.glob("imported-*"))


def test_a_foreign_package_that_is_imported_is_noticed(foreign: Path) -> None:
    subprocess.run([sys.executable, "-c", "import flows"], check=True, env=for_the_user(os.environ))
    assert imported(foreign) == ["imported-flows"]


def test_the_worker_of_an_evaluation_is_ours(foreign: Path) -> None:
    log = foreign.parent / "log"
    assert run_child("evaluation.answers.worker", b"{}\n", log_path=log, on_event=lambda _: None) != 0
    assert "evaluation/answers/worker.py" in log.read_text()
    assert imported(foreign) == []


def test_what_compares_answers_is_ours(foreign: Path) -> None:
    comparer = Comparer()
    try:
        assert comparer.equal(r"\frac{1}{2}", "0.5")
    finally:
        comparer.close()
    assert imported(foreign) == []


def test_what_runs_with_the_environment_of_the_stack_is_ours_and_so_is_what_it_starts(foreign: Path) -> None:
    told = environment(Stack(foreign.parent, "http://127.0.0.1:1", "http://127.0.0.1:1/api", "http://127.0.0.1:2"))
    # As Prefect starts a flow run: another program that imports one of ours by name.
    inner = "import importlib; importlib.import_module('flows.errors')"
    outer = f"import subprocess, sys, flows; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    subprocess.run([sys.executable, "-c", outer], check=True, env={**os.environ, **told})
    assert imported(foreign) == []


@pytest.mark.parametrize("one", [server.PREFECT, server.MLFLOW])
def test_a_server_is_ours(foreign: Path, one: server.Server) -> None:
    program, *words, _, _, _ = server.argv(foreign.parent, one, 4200)
    assert words == ["-P", "-m", "deploy.local.gate"]
    missing = subprocess.run([program, *words], check=False, capture_output=True, text=True)
    assert "sys.argv[1]" in missing.stderr
    assert imported(foreign) == []


def test_the_command_is_ours(foreign: Path) -> None:
    shown = subprocess.run([Path(sys.executable).with_name("relex"), "--help"], check=True, capture_output=True)
    assert b"Usage: relex" in shown.stdout
    assert imported(foreign) == []


def test_what_the_user_says_about_imports_is_left_as_it_is() -> None:
    assert own_code({"PYTHONSAFEPATH": "1"}) == {}
    assert for_the_user({"PYTHONSAFEPATH": "1", "HOME": "/"}) == {"PYTHONSAFEPATH": "1", "HOME": "/"}
    assert for_the_user({**own_code({}), "HOME": "/"}) == {"HOME": "/"}
