"""What `relex clean` removes: what lost and what was answered for a decision that is made, and nothing else."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from flows.settings import Settings
from flows.state.decision import Decision, Model, Score
from flows.state.records import write_json
from flows.state.windows import claim, decision_path, window_directory
from tests.helpers import cli


def write_window(settings: Settings, key: str, window: int, *, registered: bool) -> Decision:
    """Write a decided window: the last observed copy, a winner with another name elsewhere, and a loser."""
    directory = window_directory(settings, key) / "models"
    observed = Model("observed", window, str(directory / "observed"))
    winner, loser = (Model("candidate", 100, str(directory / name), name, name) for name in ("relex", "secant"))
    for model in (observed, winner, loser):
        Path(model.directory).mkdir(parents=True)
        (Path(model.directory) / "model.safetensors").write_bytes(os.urandom(10_000))
    scores = tuple(Score(model, "sort", 0.5, 0.1, 10) for model in (observed, winner, loser))
    verdict = "registered" if registered else "keep training"
    decision = Decision("tiny", key, window, (10, window), verdict, "", selection=scores, winner=winner)  # type: ignore[arg-type]
    write_json(decision_path(settings, key), decision.to_json())
    return decision


def evaluation(settings: Settings, name: str, *, made: float) -> Path:
    path = settings.home / "evaluations" / name / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    os.utime(path, (made, made))
    os.utime(path.parent, (made, made))
    return path.parent


def test_losers_and_old_evaluations_may_go_and_go_only_when_it_is_said(
    settings: Settings, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key, window, registered in (("a", 20, False), ("b", 30, True), ("c", 40, False)):
        write_window(settings, key, window, registered=registered)
        time = 1_000_000 + window
        os.utime(decision_path(settings, key), (time, time))
    undecided = window_directory(settings, "d") / "models" / "secant"
    undecided.mkdir(parents=True)
    old = evaluation(settings, "sort-1", made=1_000_000)
    new = evaluation(settings, "sort-2", made=2_000_000)
    evaluation(settings, "contents", made=1_000_000)
    before = sorted(settings.home.rglob("*"))
    told = json.loads(cli.relex(capsys, "clean", config, "--json")[1])
    assert sorted(settings.home.rglob("*")) == before
    assert {Path(each["directory"]).relative_to(settings.home).as_posix() for each in told["clutter"]} == {
        "windows/a/models/relex",  # refused, and not of the newest decision
        *(f"windows/{key}/models/secant" for key in "abc"),
        "evaluations/sort-1",
    }
    status, out, _ = cli.relex(capsys, "clean", config)
    assert status == 0
    assert "losing candidate secant @ 100 of window 20: " in out
    assert out.splitlines()[-1].endswith(f"may go: relex clean {config} --yes removes it")
    status, out, _ = cli.relex(capsys, "clean", config, "--yes")
    assert out.splitlines()[-1].startswith("removed ")
    assert not old.exists()
    assert new.exists()
    assert undecided.exists()
    assert [path.name for path in sorted(settings.home.glob("windows/b/models/*"))] == ["observed", "relex"]
    assert cli.relex(capsys, "clean", config)[1] == "nothing of it may go\n"


def test_while_a_window_is_decided_its_answers_stay(
    settings: Settings, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_window(settings, "a", 20, registered=True)
    evaluation(settings, "sort-1", made=1_000_000)
    with claim(settings, "b"):
        told = json.loads(cli.relex(capsys, "clean", config, "--json")[1])
    assert [Path(each["directory"]).name for each in told["clutter"]] == ["secant"]


def test_what_has_another_name_frees_nothing_and_what_lies_elsewhere_stays(
    settings: Settings, config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    decision = write_window(settings, "a", 20, registered=True)
    loser = decision.selection[2].model
    os.link(Path(loser.directory) / "model.safetensors", tmp_path / "kept")
    (told,) = json.loads(cli.relex(capsys, "clean", config, "--json")[1])["clutter"]
    assert told["size"] == 0
    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    moved = replace(decision.selection[2], model=replace(loser, directory=str(elsewhere)))
    write_json(decision_path(settings, "a"), replace(decision, selection=(*decision.selection[:2], moved)).to_json())
    assert cli.relex(capsys, "clean", config, "--yes")[1] == "nothing of it may go\n"
    assert elsewhere.exists()
