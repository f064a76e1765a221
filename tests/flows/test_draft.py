"""`relex init` writes a config that `relex check` accepts, from what the files of a run say."""

import json
from pathlib import Path

import pytest

from evaluation.benchmarks.benchmark import write_benchmark
from flows.settings import load_settings
from tests.helpers import cli
from tests.helpers.straight_run import WriteCheckpoint


@pytest.fixture
def place(tmp_path: Path, write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a base, a run of 200 planned steps and two benchmarks."""
    for step in (0, 10, 20, 30, 40):
        write_checkpoint(step)
    run = tmp_path / "run"
    state = {"max_steps": 200, "save_steps": 10}
    (run / "checkpoint-40" / "trainer_state.json").write_text(json.dumps(state))
    for name in ("gate", "select"):
        write_benchmark(
            tmp_path / "benchmarks", f"own-{name}", [{"prompt": f"{name} =", "answer": "1"}], max_new_tokens=1
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELEX_BENCHMARKS", str(tmp_path / "fetched"))
    return tmp_path


def test_what_init_writes_is_accepted(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = cli.relex(capsys, "init", "run", "--base", "base")
    assert (status, out, err) == (0, "wrote relex.yaml\n", "")
    settings = load_settings(place / "relex.yaml")
    assert (settings.training_run, settings.registered_model) == ("run", "run")
    assert (settings.checkpoints, settings.base) == (str(place / "run"), str(place / "base"))
    # Seven checkpoints, of which there is no backtest before, are more than a fifth of 200 steps.
    assert (settings.window, settings.max_window, settings.total_steps) == ("auto", 70, 200)
    assert (settings.selection, settings.gate) == (
        str(place / "benchmarks" / "own-select.yaml"),
        str(place / "benchmarks" / "own-gate.yaml"),
    )
    assert "checkpoints: run  " in (place / "relex.yaml").read_text()
    assert cli.relex(capsys, "check", "relex.yaml")[0] == 0


def test_of_several_pairs_of_benchmarks_that_of_the_run_is_taken(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for topic in ("add", "sort", "text"):
        for name in ("gate", "select"):
            problems = [{"prompt": f"{topic} {name} =", "answer": "1"}]
            write_benchmark(place / "benchmarks", f"{topic}-{name}", problems, max_new_tokens=1)
    (place / "run").rename(place / "qwen-sort-2")
    cli.relex(capsys, "init", "qwen-sort-2", "--base", "base")
    settings = load_settings(place / "relex.yaml")
    assert [Path(settings.selection).stem, Path(settings.gate).stem] == ["sort-select", "sort-gate"]
    # Where no name is the run's, both are of one kind at least; what is given has its own partner.
    (place / "qwen-sort-2").rename(place / "other")
    cli.relex(capsys, "init", "other", "--base", "base", "--out", "any.yaml")
    settings = load_settings(place / "any.yaml")
    assert [Path(settings.selection).stem, Path(settings.gate).stem] == ["add-select", "add-gate"]
    given = "benchmarks/text-select.yaml"
    cli.relex(capsys, "init", "other", "--base", "base", "--out", "given.yaml", "--selection", given)
    settings = load_settings(place / "given.yaml")
    assert [Path(settings.selection).stem, Path(settings.gate).stem] == ["text-select", "text-gate"]


def test_what_stands_in_an_adapter_is_the_base(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for checkpoint in (place / "run").iterdir():
        (checkpoint / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-0.5B"}))
    cli.relex(capsys, "init", "run", "--out", "sub/other.yaml")
    settings = load_settings(place / "sub" / "other.yaml")
    assert (settings.base, settings.checkpoints) == ("hf://Qwen/Qwen2.5-0.5B", str(place / "run"))


def test_init_writes_nothing_over_and_asks_for_what_no_file_says(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = cli.relex(capsys, "init", "run")
    assert (status, err) == (
        1,
        "relex: ConfigError: nothing in run says which model it started from. Give it with --base.\n",
    )
    assert cli.relex(capsys, "init", "nosuch", "--base", "base")[2].startswith(
        "relex: ConfigError: nosuch is not there."
    )
    (place / "relex.yaml").write_text("mine")
    status, _, err = cli.relex(capsys, "init", "run", "--base", "base")
    assert status == 1
    assert "relex.yaml is there and is not written over" in err
    assert (place / "relex.yaml").read_text() == "mine"


def test_without_benchmarks_the_draft_names_the_shipped_ones_and_says_how_they_are_fetched(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in (place / "benchmarks").iterdir():
        file.unlink()
    status, out, _ = cli.relex(capsys, "init", "run", "--base", "base")
    assert (status, out.splitlines()) == (
        0,
        [
            "wrote relex.yaml",
            *(
                f"relex.yaml: {key}: {name} has not been fetched: run relex benchmarks fetch {name}"
                for key, name in (("selection", "math_select"), ("gate", "math_gate"))
            ),
        ],
    )
