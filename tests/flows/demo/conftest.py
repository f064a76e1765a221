"""The demo's two processes, run for a few steps."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Runs one of the demo's modules with arguments and returns what it said.
Demo = Callable[..., subprocess.CompletedProcess[str]]


def _demo(module: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"flows.demo.{module}", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="session")
def demo() -> Demo:
    return _demo


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model after sixty supervised steps: with fewer it earns no reward, and without reward nothing moves."""
    directory = tmp_path_factory.mktemp("demo") / "base"
    done = _demo("pretrain", "--out", directory, "--steps", "60")
    assert done.returncode == 0, done.stderr
    assert "step 60/60" in done.stderr
    return directory


@pytest.fixture(scope="session")
def run(base: Path) -> Path:
    """Three real GRPO steps from the base, saved every second step."""
    directory = base.parent / "run"
    done = _demo("trainer", "--base", base, "--out", directory, "--steps", "3", "--save-steps", "2")
    assert done.returncode == 0, done.stderr
    return directory
