"""The command line: what it prints, and that a refusal is one line, exit status 1, and nothing left behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file, save_file

from flows.cli.main import app
from flows.console import markdown_table
from relex import __version__, inspection
from relex.predictors import METHODS
from tests.helpers import cli
from tests.helpers.straight_run import WriteCheckpoint, make_old

Relex = Callable[..., tuple[int, str, str]]


@pytest.fixture
def relex(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Relex:
    """Run the command line in this process; returns exit status, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return cli.relex(capsys, *arguments)

    return run


@pytest.fixture
def store(tmp_path: Path, write_checkpoint: WriteCheckpoint) -> Path:
    for step in (0, 10, 20, 25, 40):
        write_checkpoint(step)
    return tmp_path


def predict(relex: Relex, store: Path, *more: object, target: int = 100) -> tuple[int, str, str]:
    arguments = [store / "run", "--base", store / "base", "--out", store / "out", "--target-step", target, *more]
    return relex("extrapolate", *arguments)


def test_inspect_shows_every_step_and_how_straight_the_run_is(relex: Relex, store: Path) -> None:
    status, out, _ = relex("inspect", store / "run", "--base", store / "base", "--json")
    assert status == 0
    content = json.loads(out)
    assert [(row["step"], row["state"]) for row in content["steps"]] == [
        (10, "ready"),
        (20, "ready"),
        (25, "ready"),
        (40, "ready"),
    ]
    assert content["straightness"]["energy"] == pytest.approx(1.0)
    assert content["straightness"]["r_squared"] == pytest.approx(1.0)
    status, out, _ = relex("inspect", store / "run", "--base", store / "base")
    assert status == 0
    assert "R²" in out


def test_inspect_says_why_a_step_is_not_ready(relex: Relex, store: Path) -> None:
    broken = store / "run" / "checkpoint-25"
    (broken / "model.safetensors").write_bytes(b"short")
    make_old(broken)
    _, out, _ = relex("inspect", store / "run", "--base", store / "base", "--json")
    row = json.loads(out)["steps"][2]
    assert row["state"] == "broken"
    assert "is not a whole safetensors file" in row["reason"]


def test_a_straight_run_is_continued_and_a_second_call_is_a_no_op(relex: Relex, store: Path) -> None:
    status, out, err = predict(relex, store, "--json")
    assert status == 0, err
    (manifest,) = json.loads(out)
    assert manifest["window"] == [10, 20, 25, 40]
    predicted = load_file(store / "out" / "step-100" / "model.safetensors")["weight"]
    base, first = (load_file(store / name / "model.safetensors")["weight"] for name in ("base", "run/checkpoint-10"))
    torch.testing.assert_close(predicted, base + 10 * (first - base), rtol=0, atol=1e-5)
    before = (store / "out" / "step-100" / "model.safetensors").stat()
    assert predict(relex, store)[0] == 0
    assert (store / "out" / "step-100" / "model.safetensors").stat() == before


def nothing(store: Path) -> list[object]:
    return []


def no_checkpoints(store: Path) -> list[object]:
    shutil.rmtree(store / "run")
    (store / "run").mkdir()
    return []


def one_step(store: Path) -> list[object]:
    return ["--window", 15]


def another_base(store: Path) -> list[object]:
    save_file({"weight": torch.zeros(3, 6)}, store / "base" / "model.safetensors")
    return []


def missing_shard(store: Path) -> list[object]:
    directory = store / "run" / "checkpoint-20"
    (directory / "model.safetensors").rename(directory / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    make_old(directory)
    return []


def truncated_shard(store: Path) -> list[object]:
    file = store / "run" / "checkpoint-20" / "model.safetensors"
    os.truncate(file, file.stat().st_size - 7)
    make_old(file.parent)
    return []


def not_a_number(store: Path) -> list[object]:
    file = store / "run" / "checkpoint-20" / "model.safetensors"
    weight = load_file(file)["weight"]
    weight[3, 3] = torch.nan
    save_file({"weight": weight}, file)
    (file.parent / "trainer_state.json").write_text("{}")
    return []


def occupied(store: Path) -> list[object]:
    (store / "out" / "step-100").mkdir(parents=True)
    (store / "out" / "step-100" / "mine.txt").write_text("precious")
    return []


@pytest.mark.parametrize(
    ("spoil", "target", "message"),
    [
        (no_checkpoints, 100, "has no checkpoints"),
        (one_step, 100, "has 1 checkpoint at or before step 15"),
        (another_base, 100, r"weight has shape \[8, 6\], the base .* has \[3, 6\]"),
        (missing_shard, 100, "names 2 shards and 1 are present .*model-00002-of-00002.safetensors"),
        (truncated_shard, 100, "is not a whole safetensors file"),
        (not_a_number, 100, "weight holds NaN or infinity at step 20"),
        (nothing, 40, "target step 40 is not beyond the window, which ends at step 40.*--allow-inside"),
        (occupied, 100, "exists and holds something relex did not write"),
        (lambda store: ["--method", "magic"], 100, "method 'magic' is not known"),
        (lambda store: ["--rank", 9], 100, "rank 9 needs as many checkpoints, and the window has 4"),
        (lambda store: ["--dtype", "int4"], 100, "dtype 'int4' is not known"),
        (lambda store: ["--memory", "1KiB"], 100, "--memory .* is below"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    relex: Relex, store: Path, spoil: Callable[[Path], list[object]], target: int, message: str
) -> None:
    more = spoil(store)
    before = sorted(path for path in store.rglob("*") if "cache" not in path.parts)
    status, out, err = predict(relex, store, *more, target=target)
    assert status == 1
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("relex: ")
    assert re.search(message, err), err
    assert sorted(path for path in store.rglob("*") if "cache" not in path.parts) == before


def test_a_target_inside_the_window_is_predicted_when_asked_for(relex: Relex, store: Path) -> None:
    assert predict(relex, store, "--allow-inside", target=25)[0] == 0
    assert (store / "out" / "step-25" / "relex.json").is_file()


@pytest.mark.parametrize(
    "command", ["inspect", "extrapolate", "evaluate", "watch", "up", "down", "status", "models", "demo"]
)
def test_every_command_has_help_with_an_example(relex: Relex, command: str) -> None:
    status, out, _ = relex(command, "--help")
    assert status == 0
    assert f"Example: relex {command}" in " ".join(out.split())


def test_every_method_is_listed_and_named_where_one_is_asked_for(relex: Relex) -> None:
    status, out, _ = relex("methods")
    assert status == 0
    for name, row in METHODS.items():
        assert re.search(rf"^ {name} ", out, re.MULTILINE)
        assert all(f"  {key}=" in out for key in row.parameters)
    rows = json.loads(relex("methods", "--json")[1])
    assert list(rows) == list(METHODS)
    assert rows["relex-pinned"]["defaults"] == {"rank": 1, "damping": 1.0}
    for command in ("extrapolate", "compare", "backtest"):
        # A terminal breaks names at their hyphens.
        words = "".join(relex(command, "--help")[1].split())
        assert all(name in words for name in METHODS)
        assert "<methods>" not in words


def test_the_help_groups_commands_and_imports_nothing_heavy() -> None:
    code = "import sys\nfrom flows.cli.main import main\ntry:\n    main()\nfinally:\n    print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^(\w[^:\n]*):$", shown, re.MULTILINE) == [
        "Options",
        "A run",
        "A decision",
        "A model",
        "A study",
    ]
    # Every command stands below one of them.
    listed = set(re.findall(r"^  ([a-z]+) ", shown.partition("A run:")[2], re.MULTILINE))
    assert listed == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert not {"torch", "mlflow", "prefect", "lm_eval", "numpy"} & set(shown.splitlines()[-1].split())


def test_the_version_is_printed_and_a_shell_completes_commands(relex: Relex) -> None:
    assert relex("--version") == (0, f"relex {__version__}\n", "")
    asked = {"_RELEX_COMPLETE": "complete_bash", "COMP_WORDS": "relex st", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "flows.cli"]
    shown = subprocess.run(command, env={**os.environ, **asked}, capture_output=True, text=True, check=True).stdout
    assert shown.split() == ["status", "stop"]


def test_a_bar_in_a_cell_does_not_end_it() -> None:
    lines = markdown_table(("model", "Σ|c|"), [("a|b", "1.0"), ("c", "")])
    assert lines == ["| model | Σ\\|c\\| |", "|---|---|", "| a\\|b | 1.0 |", "| c |  |"]


def test_an_interrupted_command_says_that_what_is_finished_is_kept(
    relex: Relex, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect", interrupt)
    status, out, err = relex("inspect", store / "run", "--base", store / "base")
    assert (status, out) == (130, "")
    assert err == "relex: interrupted; what is finished is kept\n"


def test_the_module_is_the_command() -> None:
    run = subprocess.run([sys.executable, "-m", "flows.cli", "inspect"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "relex inspect --help" in run.stderr


def test_wrong_usage_is_exit_status_2(relex: Relex) -> None:
    assert relex("extrapolate")[0] == 2
    assert relex("inspect", "nowhere", "--base", "b", "--memory", "lots")[0] == 2


def test_commands_that_need_the_stack_say_how_to_start_it(relex: Relex, config: Path, tmp_path: Path) -> None:
    status, _, err = relex("watch", config, "--home", tmp_path / "home")
    assert status == 1
    assert "Start the stack with `relex up`" in err


def test_up_refuses_an_unknown_benchmark_before_it_starts_anything(relex: Relex, config: Path, tmp_path: Path) -> None:
    status, _, err = relex("up", config, "--home", tmp_path / "home")
    assert status == 1
    assert "selection.yaml" in err
    assert not (tmp_path / "home").exists()
