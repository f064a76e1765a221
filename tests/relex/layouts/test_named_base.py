"""An adapter that names another base than the one it is read on is told of, and one that names its own is not."""

import shutil
import time
from pathlib import Path

import pytest

from relex.inspection import inspect
from relex.layouts.named_base import foreign_base
from relex.store import open_base, scan
from tests.helpers.peft_files import settings, write_run
from tests.helpers.trajectories import Run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("lora"), steps=(10, 25), targets=("q_proj",))


def doubt(run: Run, named: str | None) -> str:
    for step in (10, 25):
        settings(run.run / f"checkpoint-{step}", base_model_name_or_path=named)
    stored = scan(run.run, open_base(run.base), now=time.time())
    return foreign_base([checkpoint.weights for checkpoint in stored if checkpoint.weights is not None])


def test_its_own_base_is_recognised_by_path_by_name_and_by_content(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "renamed"
    shutil.copytree(run.base, copy)
    cached = "/hub/models--org--Base/snapshots/0123"
    for named in (None, "", str(run.base), f"{run.base}/", "org/Base", "org/base", cached, str(copy)):
        assert doubt(run, named) == "", named


def test_another_base_is_named_with_both(run: Run, tmp_path: Path) -> None:
    # Of the same shape and the same name, so that nothing else tells.
    other = write_run(tmp_path / "other", steps=(10,), targets=("q_proj",), seed=1).base
    for named in ("Qwen/Qwen2.5-0.5B", str(other)):
        line = doubt(run, named)
        assert line.startswith(f"{run.run / 'checkpoint-25'} is an adapter of {named} (base_model_name_or_path), and")
        assert f"the base given is {run.base}" in line


def test_inspect_warns_of_it(run: Run, tmp_path: Path) -> None:
    line = doubt(run, "Qwen/Qwen2.5-0.5B")
    inspected = inspect(run.run, run.base, grams=tmp_path, memory=1 << 30, threads=1)
    assert [(each.step, each.text) for each in inspected.findings if each.kind == "base"] == [(25, line)]
