"""A real, short RLVR run and a real stack, made once for all end-to-end tests."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from filelock import FileLock

from deploy.local import stack
from deploy.local.stack import Stack
from evaluation.benchmarks.benchmark import write_benchmark
from flows.demo.task import DIGITS, problems
from tests.helpers import ROOT
from tests.helpers.stacks import environment_given_back

STEPS = 24


@dataclass(frozen=True)
class TrainedRun:
    """A base model and the checkpoints of STEPS steps of GRPO, one every second step."""

    base: Path
    checkpoints: Path


@pytest.fixture(scope="session")
def trained(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Train once for each version of the demo and of what it trains with; pytest's cache keeps it, tests copy it."""
    made = tmp_path_factory.mktemp("trained") / "made"
    cache = getattr(pytestconfig, "cache", None)
    root = made if cache is None else cache.mkdir("trained") / _version()
    with FileLock(root.with_suffix(".lock")):
        if not root.exists():
            demo(["flows.demo.pretrain", "--out", str(made / "base")])
            steps = ["--steps", str(STEPS), "--save-steps", "2"]
            demo(["flows.demo.trainer", "--base", str(made / "base"), "--out", str(made / "run"), *steps])
            if root != made:
                for former in root.parent.glob("*/"):
                    shutil.rmtree(former)
                # Complete or absent, on whichever disk it was made.
                shutil.copytree(made, root.with_suffix(".part"), dirs_exist_ok=True)
                root.with_suffix(".part").rename(root)
    return TrainedRun(root / "base", root / "run")


def _version() -> str:
    content = [path.read_bytes() for path in sorted((ROOT / "flows" / "demo").glob("*.py"))]
    content += [version(library).encode() for library in ("torch", "transformers", "trl")]
    return sha256(b"\0".join([*content, str(STEPS).encode()])).hexdigest()[:16]


def demo(command: list[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def servers(home: Path) -> Iterator[Stack]:
    with environment_given_back():
        try:
            yield stack.up(home)
        finally:
            stack.down(home)


@pytest.fixture(scope="session")
def server_environment(servers: Stack) -> dict[str, str]:
    # On shared cores the threads of a tiny model only fight each other.
    return {**os.environ, **stack.environment(servers), "OMP_NUM_THREADS": "1"}


def write_config(
    directory: Path, trained: TrainedRun, *, name: str, targets: list[int], changes: Mapping[str, object] | None = None
) -> Path:
    """Write a relex.yaml and its benchmarks for the trained run; the checkpoints are to appear in directory/run."""
    for split, count in (("selection", 200), ("gate", 300)):
        write_benchmark(
            directory,
            f"sort-{split}",
            problems(split, count),  # type: ignore[arg-type]
            max_new_tokens=DIGITS + 1,
        )
    content = {
        "training_run": name,
        "checkpoints": "run",
        "base": str(trained.base),
        "window": STEPS,
        "targets": targets,
        "selection": "sort-selection.yaml",
        "gate": "sort-gate.yaml",
        "registered_model": name,
        "memory": "64MiB",
        "batch_size": 100,
        "poll_seconds": 0.5,
    }
    path = directory / "relex.yaml"
    path.write_text(yaml.safe_dump(content | dict(changes or {})))
    return path
