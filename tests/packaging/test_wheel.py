"""What `pip install relex-rlvr` gives: the wheel in an environment with its base dependencies and nothing else."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from relex import __version__
from tests.helpers import ROOT
from tests.helpers.straight_run import make_old, write_checkpoint

pytestmark = pytest.mark.slow

PACKAGES = ("relex", "evaluation", "deploy", "flows")


def closure(requirements: list[str]) -> dict[str, Distribution]:
    """Return what these need, and what that needs, as it is installed here."""
    result: dict[str, Distribution] = {}
    todo = [Requirement(text) for text in requirements]
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        extras = {"", *requirement.extras}
        if name in result and extras == {""}:
            continue
        result[name] = distribution(name)
        for needed in map(Requirement, result[name].requires or []):
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                todo.append(needed)
    return result


def build(out: Path, **environment: str) -> tuple[Path, str]:
    """Return the wheel and what pip said."""
    source = out / "source"
    # A build leaves directories beside what it builds.
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    command = [*pip, "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment)
    (made,) = out.glob("*.whl")
    return made, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))[0]


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that has the wheel and what it requires, linked to what is installed here."""
    place = tmp_path_factory.mktemp("bare")
    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--python", str(place / "bin/python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-deps", "--no-index", wheel], check=True)
    (metadata,) = packages.glob("relex_rlvr-*.dist-info")
    required = Distribution.at(metadata).requires or []
    for needed in closure([text for text in required if "extra ==" not in text]).values():
        for file in needed.files or []:
            top = file.parts[0]
            if top != ".." and not (packages / top).exists():
                (packages / top).symlink_to(Path(str(needed.locate_file(top))))
    return place / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a user's own packages, which are named like ours."""
    for name in ("flows", "evaluation", "deploy"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        (tmp_path / "mine" / name / "__init__.py").write_text(f"raise AssertionError('{name} of the user is imported')")
    monkeypatch.chdir(tmp_path / "mine")
    return tmp_path / "mine"


def run(bare: Path, *words: object, status: int = 0) -> tuple[str, str]:
    done = subprocess.run([bare / "relex", *map(str, words)], check=False, capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr


def test_the_name_the_version_and_the_packages(wheel: Path, bare: Path) -> None:
    assert wheel.name.startswith(f"relex_rlvr-{__version__}-cp3")
    (packages,) = bare.parent.glob("lib/python*/site-packages")
    (metadata,) = packages.glob("relex_rlvr-*.dist-info")
    ours = {Path(file).parts[0] for file in Distribution.at(metadata).files or []}
    assert {name for name in ours if not name.startswith(("..", "relex_rlvr"))} == set(PACKAGES)
    assert not [name for name in ("prefect", "mlflow", "lm_eval", "transformers") if (packages / name).exists()]


def test_without_a_compiler_it_is_built_too_and_nothing_is_said(tmp_path: Path) -> None:
    made, said = build(tmp_path, CC="/nowhere/cc")
    assert said == ""
    with zipfile.ZipFile(made) as files:
        assert [name for name in files.namelist() if name.endswith((".so", ".pyd"))] == []


def test_it_inspects_backtests_and_extrapolates(bare: Path, elsewhere: Path, tmp_path: Path) -> None:
    for step in (0, 10, 20, 25, 40):
        make_old(write_checkpoint(tmp_path, step))
    where = (tmp_path / "run", "--base", tmp_path / "base", "--cache", tmp_path / "cache")
    assert "rank-1 energy" in run(bare, "inspect", *where)[0]
    assert "recommended" in run(bare, "backtest", *where)[0]
    assert "secant" in run(bare, "methods")[0]
    run(bare, "analyze", *where, "--out", tmp_path / "analysis")
    run(bare, "extrapolate", *where, "--target-step", 100, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "step-100" / "model.safetensors").exists()
    assert list(elsewhere.rglob("*.pyc")) == []


@pytest.mark.parametrize("words", ["evaluate MODEL --benchmark math", "benchmarks fetch", "up", "status"])
def test_a_command_that_lacks_a_library_says_what_to_install(bare: Path, elsewhere: Path, words: str) -> None:
    assert run(bare, *words.split(), "--help")[0].startswith("Usage: relex")
    _, said = run(bare, *words.split(), status=1)
    assert said == (
        f"relex: InstallationError: relex {words.split(maxsplit=1)[0]} needs more than is installed"
        " (lm_eval, prefect, mlflow). pip install 'relex-rlvr[all]' brings every command.\n"
    )


def test_the_help_says_it_too(bare: Path, elsewhere: Path) -> None:
    *_, first, second = run(bare, "--help")[0].splitlines()
    assert first == "Without lm_eval, prefect, mlflow most commands only say what they need."
    assert second == "pip install 'relex-rlvr[all]' brings every command."
