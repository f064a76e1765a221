"""relex backtest: what a person and a machine read."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from docs import reference
from flows.cli.main import main
from relex.predictors import METHODS, Row
from relex.predictors.predictor import Predictor, Window
from tests.helpers.cli import relex
from tests.helpers.straight_run import WriteCheckpoint, make_old

Relex = Callable[..., str]


@pytest.fixture
def backtest(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    write_checkpoint: WriteCheckpoint,
) -> Relex:
    """Backtest a straight run of 12 checkpoints from the command line in this process; returns stdout."""
    for step in (0, *range(5, 65, 5)):
        make_old(write_checkpoint(step))
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: object) -> str:
        where = [tmp_path / "run", "--base", tmp_path / "base", "--cache", tmp_path / "cache"]
        status, out, _ = relex(capsys, "backtest", *where, *arguments)
        assert status == 0
        return out

    return run


def test_a_person_reads_the_skill_by_form_and_horizon_and_one_recommendation(backtest: Relex) -> None:
    out = backtest()
    assert "12 checkpoints, steps 5 to 60" in out
    for form in ("relex", "relex-pinned:damping=0.3", "relex-pinned:damping=1"):
        assert any(line.split()[:1] == [form] for line in out.splitlines()), form
    assert "recommended: relex" in out
    assert "beat the latest checkpoint: skill 1.00 so far" in out


def test_a_machine_reads_every_cell_and_tensor(backtest: Relex) -> None:
    content = json.loads(backtest("--json"))
    assert content["names"] == ["weight"]
    assert {cell["way"]["start"] for cell in content["cells"]} == {0.0, 0.5, 0.75}
    assert all(len(cell["by_tensor"]) == 1 for cell in content["cells"])
    assert content["recommendation"]["target_step"] > 60


def test_checkpoints_beyond_the_window_are_not_looked_at(backtest: Relex) -> None:
    out = backtest("--window", 20)
    assert "4 checkpoints, steps 5 to 20" in out
    assert "recommended: hold" in out
    assert "too few to tell a direction from chance" in out


@dataclass(frozen=True)
class Chord(Predictor):
    """The line through two checkpoints, `back` apart: a method as somebody would write it."""

    back: int = 1

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return (T, K): the latest checkpoint, and its way from the earlier one as often as there are steps to go."""
        steps_K = window.steps_K
        share = (target_step - steps_K[-1]) / (steps_K[-1] - steps_K[-1 - self.back])
        coefficients_K = torch.zeros(len(steps_K), dtype=torch.float64)
        coefficients_K[-1] = 1.0 + share
        coefficients_K[-1 - self.back] = -share
        return coefficients_K.expand(window.gram_TKK.shape[:-1])


def test_a_method_is_one_file_and_one_row_to_the_end(
    backtest: Relex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("line through two checkpoints", Chord, {"back": int}, paper="0000.00000")
    monkeypatch.setitem(METHODS, "chord", row)
    out = backtest("--method", "chord:back=2")
    assert any(line.split()[:1] == ["chord:back=2"] and "1.00" in line for line in out.splitlines()), out
    cells = json.loads(backtest("--method", "chord:back=2", "--json"))["cells"]
    assert any(cell["way"]["method"] == "chord:back=2" and cell["trusted"] for cell in cells)
    for command in ("backtest", "extrapolate", "compare"):
        assert "chord (back=1)" in " ".join(relex(capsys, command, "--help")[1].split())
    assert "| `chord` | line through two checkpoints | `back=1` |" in reference.methods()


def test_a_method_that_fits_no_window_has_an_empty_line_and_one_without_a_backtest_is_refused(
    backtest: Relex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = backtest("--method", "polynomial:degree=30")
    assert any(line.split() == ["polynomial:degree=30"] for line in out.splitlines()), out
    monkeypatch.setattr(sys, "argv", ["relex", "backtest", "run", "--base", "base", "--method", "next"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    assert "method next has no backtest: it reads the weights" in capsys.readouterr().err
