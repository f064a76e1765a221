"""relex backtest: what a person and a machine read."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flows.cli.main import main
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
        monkeypatch.setattr(sys, "argv", ["relex", "backtest", *map(str, [*where, *arguments])])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code
        return capsys.readouterr().out

    return run


def test_a_person_reads_the_skill_by_form_and_horizon_and_one_recommendation(backtest: Relex) -> None:
    out = backtest()
    assert "12 checkpoints, steps 5 to 60" in out
    for form in ("relex", "relex-pinned:damping=0.3", "relex-pinned:damping=1"):
        assert any(line.split()[:1] == [form] for line in out.splitlines()), form
    assert "recommended: relex" in out
    assert "beats the latest checkpoint: skill 1.00" in out


def test_a_machine_reads_every_cell_and_tensor(backtest: Relex) -> None:
    found = json.loads(backtest("--json"))
    assert found["names"] == ["weight"]
    assert {cell["way"]["start"] for cell in found["cells"]} == {0.0, 0.5, 0.75}
    assert all(len(cell["by_tensor"]) == 1 for cell in found["cells"])
    assert found["recommendation"]["target_step"] > 60


def test_checkpoints_beyond_the_window_are_not_looked_at(backtest: Relex) -> None:
    out = backtest("--window", 20)
    assert "4 checkpoints, steps 5 to 20" in out
    assert "recommended: hold" in out
    assert "too few to tell a direction from chance" in out
