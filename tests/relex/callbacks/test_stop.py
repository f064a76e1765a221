"""StopOnFile in transformers' own Trainer, in one process and in two."""

import importlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from relex.callbacks import StopOnFile
from tests.relex.callbacks.stopping_trainer import STEPS, WriteAtStep, train


def test_the_training_ends_after_the_step_at_which_the_file_appears_and_saves_it(tmp_path: Path) -> None:
    stop = tmp_path / "STOP"
    assert train(tmp_path, [WriteAtStep(stop, 5, seconds=0), StopOnFile(stop)]) == 5
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-5"]
    assert (tmp_path / "run/checkpoint-5/trainer_state.json").is_file()


def test_a_file_that_an_earlier_training_left_is_warned_of_and_ignored_until_it_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stop = tmp_path / "STOP"
    stop.write_text("{}")
    with caplog.at_level(logging.WARNING, "relex.callbacks.stop"):
        assert train(tmp_path, [StopOnFile(stop)]) == STEPS
    assert [record.getMessage() for record in caplog.records] == [
        f"stop file {stop} is older than this training and is ignored; write it anew to stop"
    ]
    assert train(tmp_path, [WriteAtStep(stop, 7, seconds=0), StopOnFile(stop)]) == 7


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of two processes, in an interpreter of its own, left behind."""
    out = tmp_path_factory.mktemp("ranks")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "tests.relex.callbacks.stopping_trainer", str(out), str(port)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_every_rank_ends_at_the_same_step_when_the_file_appears_between_their_looks(two_ranks: Path) -> None:
    # The first rank had looked when the file came, so it is seen a step later.
    assert [(two_ranks / f"rank-{rank}").read_text() for rank in range(2)] == ["6", "6"]
    assert [path.name for path in (two_ranks / "run").iterdir()] == ["checkpoint-6"]


@pytest.mark.slow
def test_the_training_s_process_is_spared_what_only_relex_needs(two_ranks: Path) -> None:
    imported = set((two_ranks / "modules").read_text().splitlines())
    assert "relex.callbacks.stop" in imported
    assert not imported & {"prefect", "mlflow", "lm_eval", "math_verify", "typer", "flows", "evaluation", "deploy"}
    assert {name for name in imported if name.startswith("relex.")} == {
        "relex.callbacks",
        *(f"relex.callbacks.{module}" for module in ("jump", "ladder", "scoring", "stop", "weights")),
    }


@pytest.mark.parametrize("former", ["flows.stop.callback", "flows.stop_callback"])
def test_a_trainer_that_imports_it_from_where_it_was_is_told_where_it_is(former: str) -> None:
    sys.modules.pop(former, None)
    with pytest.warns(DeprecationWarning, match=r"is relex\.callbacks now: import StopOnFile from there"):
        assert importlib.import_module(former).StopOnFile is StopOnFile
