"""A trainer's setting that would eat the window, told from the files it really writes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import TrainingArguments
from trl.trainer.grpo_config import GRPOConfig

from relex.files.local import LocalDirectory
from relex.layouts.pruning import Limit, find_limit, setting_of, warning
from tests.helpers.trajectories import write_model


def say(run: Path, step: int, **arguments: Any) -> None:
    """Write what Trainer writes beside a checkpoint's weights."""
    directory = run / f"checkpoint-{step}"
    directory.mkdir()
    torch.save(GRPOConfig(output_dir=str(run), bf16=False, use_cpu=True, **arguments), directory / "training_args.bin")


def test_the_limit_is_read_from_the_arguments_that_trl_pickles(tmp_path: Path) -> None:
    say(tmp_path, 10, save_total_limit=2, save_steps=10)
    place = f"{tmp_path}/checkpoint-10/training_args.bin"
    assert find_limit(LocalDirectory(tmp_path)) == Limit(place, "save_total_limit", 2, 10)
    assert warning(LocalDirectory(tmp_path), window=75) == (
        f"{place}: save_total_limit is 2, and a window of 75 steps with a checkpoint every 10 needs 8: the trainer will"
        " delete the first of them. Set save_total_limit to 8 or more, or pin: link in relex.yaml"
    )


@pytest.mark.parametrize(
    ("arguments", "window"),
    [({"save_steps": 10}, 75), ({"save_steps": 10, "save_total_limit": 8}, 75), ({"save_total_limit": 1}, 400)],
    ids=["no limit", "a limit that is enough", "one checkpoint is all it takes"],
)
def test_a_limit_that_spares_the_window_is_not_mentioned(
    tmp_path: Path, arguments: dict[str, int], window: int
) -> None:
    say(tmp_path, 10, **arguments)
    assert warning(LocalDirectory(tmp_path), window=window) == ""


def test_checkpoints_closer_than_the_setting_says_count(tmp_path: Path) -> None:
    for step in (10, 25):
        directory = tmp_path / f"checkpoint-{step}"
        directory.mkdir()
        torch.save(
            TrainingArguments(str(tmp_path), save_total_limit=3, save_strategy="epoch"), directory / "training_args.bin"
        )
    assert "every 15 needs 5" in warning(LocalDirectory(tmp_path), window=75)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        (
            "step_20/config.yaml",
            {"checkpointing": {"keep_top_k": 3, "save_period": 10}},
            "checkpointing.keep_top_k is 3, and a window of 75 steps with a checkpoint every 10 needs 8",
        ),
        (
            ".hydra/config.yaml",
            {"trainer": {"max_actor_ckpt_to_keep": 2, "save_freq": 20}},
            "trainer.max_actor_ckpt_to_keep is 2, and a window of 75 steps with a checkpoint every 20 needs 4",
        ),
    ],
)
def test_the_limit_is_read_from_the_configuration_of_nemo_rl_and_verl(
    tmp_path: Path, file: str, content: dict[str, object], said: str
) -> None:
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_text(yaml.safe_dump(content))
    assert said in warning(LocalDirectory(tmp_path), window=75)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK\x05\x06",
        b"cos\nsystem\n(S'touch executed'\ntR.",
        b"checkpointing: {keep_top_k: many}",
        b"[[[[",
        b"- 1",
    ],
)
@pytest.mark.parametrize("file", ["checkpoint-10/training_args.bin", "step_10/config.yaml"])
def test_a_file_that_is_something_else_says_nothing_and_executes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / file).parent.mkdir()
    (tmp_path / file).write_bytes(content)
    assert warning(LocalDirectory(tmp_path), window=75) == ""
    assert not (tmp_path / "executed").exists()


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "content",
    [
        "a0: &a0 {k: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{','.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 13)),
        "a: 2001-99-99",
        "a: " + "9" * 5000,
        "a: !!binary [1]",
        "[" * 5000,
    ],
)
def test_a_configuration_that_is_none_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "step_10").mkdir()
    (tmp_path / "step_10" / "config.yaml").write_text("checkpointing: {keep_top_k: 1, save_period: 1}\n" + content)
    assert find_limit(LocalDirectory(tmp_path)) is None


def test_every_truncation_of_the_arguments_says_nothing(tmp_path: Path) -> None:
    say(tmp_path, 10, save_total_limit=2, save_steps=10)
    file = tmp_path / "checkpoint-10" / "training_args.bin"
    whole = file.read_bytes()
    for length in range(0, len(whole), 37):
        file.write_bytes(whole[:length])
        assert find_limit(LocalDirectory(tmp_path)) is None


def test_broadcasts_are_pinned_or_lost(tmp_path: Path) -> None:
    for step in (0, 1, 2):
        write_model(tmp_path / f"step_{step}", {"w": torch.ones(3)})
        (tmp_path / f"step_{step}" / "STABLE").touch()
    run = LocalDirectory(tmp_path)
    assert warning(run, window=75).endswith(
        "deletes each of its broadcasts two steps later. Set pin: link in relex.yaml"
    )
    assert setting_of(run.enter("step_1")) == ""


@pytest.mark.parametrize(
    ("step", "inside", "setting"),
    [
        ("step_10", "trainer", "ckpt.keep_last"),
        ("step_10", "policy", "checkpointing.keep_top_k"),
        ("checkpoint-10", "trainer", "save_total_limit"),
        ("hf_10", "trainer", "the trainer's number of kept checkpoints"),
    ],
)
def test_each_trainer_has_a_name_for_what_it_keeps(step: str, inside: str, setting: str, tmp_path: Path) -> None:
    (tmp_path / step / inside).mkdir(parents=True)
    assert setting_of(LocalDirectory(tmp_path / step)) == setting
