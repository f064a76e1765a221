"""A real GRPO run of three steps, and what the command refuses."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# The end-to-end tests train too: these are for what make test leaves out.
pytestmark = pytest.mark.slow

Demo = Callable[..., subprocess.CompletedProcess[str]]


def test_checkpoints_carry_their_step_and_the_last_step_is_always_saved(run: Path) -> None:
    assert sorted(path.name for path in run.iterdir() if path.is_dir()) == ["checkpoint-2", "checkpoint-3"]
    for step in (2, 3):
        state = json.loads((run / f"checkpoint-{step}" / "trainer_state.json").read_text())
        assert state["global_step"] == step


def test_the_marker_is_the_last_file_of_a_checkpoint(run: Path) -> None:
    written = {file.name: file.stat().st_mtime_ns for file in (run / "checkpoint-3").iterdir()}
    assert max(written.values()) == written["trainer_state.json"]


def test_a_checkpoint_loads_and_its_weights_moved(base: Path, run: Path) -> None:
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run / "checkpoint-3").state_dict()
    assert before.keys() == after.keys()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > len(before) / 2


def test_a_checkpoint_keeps_the_base_models_tokenizer(base: Path, run: Path) -> None:
    assert (run / "checkpoint-2" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert AutoTokenizer.from_pretrained(run / "checkpoint-2")("1=").input_ids[0] == 1


@pytest.fixture(scope="module")
def other(demo: Demo, base: Path) -> tuple[Path, str]:
    """The checkpoint of one step of another task, stored in bf16, and what was said of it."""
    out = base.parent / "other"
    done = demo("trainer", "--base", base, "--out", out, "--steps", "1", "--task", "add", "--dtype", "bfloat16")
    assert done.returncode == 0, done.stderr
    return out / "checkpoint-1", done.stderr


def test_bf16_checkpoints_hold_the_tied_weights_once(other: tuple[Path, str], base: Path) -> None:
    stored = load_file(other[0] / "model.safetensors")
    assert stored.keys() == load_file(base / "model.safetensors").keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


def test_another_task_rewards_other_answers(other: tuple[Path, str]) -> None:
    assert "step 1/1 reward 0.000" in other[1], "a model that sorts does not add"


def test_an_adapter_on_partial_credit_and_a_rate_that_falls(demo: Demo, base: Path) -> None:
    out = base.parent / "adapter"
    options = ["--lora", "2", "--reward", "credit", "--schedule", "linear", "--prompts", "2"]
    done = demo("trainer", "--base", base, "--out", out, "--steps", "2", *options)
    assert done.returncode == 0, done.stderr
    state = json.loads((out / "checkpoint-2" / "adapter_config.json").read_text())
    assert (state["r"], state["lora_alpha"]) == (2, 4)
    first, second = (load_file(out / f"checkpoint-{step}" / "adapter_model.safetensors") for step in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    arguments = torch.load(out / "checkpoint-2" / "training_args.bin", weights_only=False)
    assert arguments.lr_scheduler_type == "linear"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "b"), "Missing option '--out'"),
        (
            ("--base", "b", "--out", "o", "--steps", "-1"),
            "Invalid value for '--steps': Input should be greater than or equal to 1",
        ),
        (
            ("--base", "b", "--out", "o", "--learning-rate", "fast"),
            "Invalid value for '--learning-rate': Input should be a valid number",
        ),
        (("--base", "b", "--out", "o", "--dtype", "int8"), "'int8' is not one of 'float32', 'bfloat16'"),
        (("--base", "b", "--out", "o", "--task", "multiply"), "'multiply' is not one of 'sort', 'add'"),
    ],
)
def test_wrong_usage_is_answered_in_one_line(demo: Demo, arguments: tuple[str, ...], message: str) -> None:
    done = demo("trainer", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def _without_weights(base: Path) -> str:
    (base / "model.safetensors").unlink()
    return "model.safetensors missing"


def _with_torn_weights(base: Path) -> str:
    with (base / "model.safetensors").open("r+b") as file:
        file.truncate(100_000)
    return "model.safetensors is damaged"


def _with_an_empty_config(base: Path) -> str:
    (base / "config.json").write_text("")
    return "config.json is damaged"


def _with_an_old_run(base: Path) -> str:
    (base.parent / "run" / "checkpoint-1").mkdir(parents=True)
    return "run exists and is not an empty directory"


@pytest.mark.parametrize("spoil", [_without_weights, _with_torn_weights, _with_an_empty_config, _with_an_old_run])
def test_bad_directories_are_refused_in_one_line_and_left_as_they_are(
    demo: Demo, base: Path, tmp_path: Path, spoil: Callable[[Path], str]
) -> None:
    copy = tmp_path / "base"
    shutil.copytree(base, copy)
    message = spoil(copy)
    before = sorted(tmp_path.rglob("*"))
    done = demo("trainer", "--base", copy, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
