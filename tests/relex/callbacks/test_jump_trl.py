"""JumpCallback in TRL's GRPOTrainer: rewards of single problems, what it leaves alone, resuming, engine, adapters."""

import copy
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from flows.demo import task
from flows.demo.model import build_model, build_tokenizer
from relex.callbacks import JumpCallback, ladder, scoring, weights

STEPS, PROBLEMS = 8, 24


def ones(completions: list[str], **_: Any) -> list[float]:
    """Reward what a random model learns in a few steps."""
    return [completion.count("1") / task.DIGITS for completion in completions]


def make(out: Path, callbacks: Sequence[TrainerCallback], **more: Any) -> Any:
    tokenizer = build_tokenizer()
    adapter = more.pop("peft_config", None)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "num_generations": 4,
        "num_generations_eval": 2,
        "max_completion_length": task.DIGITS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "save_strategy": "no",
        "logging_steps": 3,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return GRPOTrainer(
        model=build_model(tokenizer, seed=0),
        processing_class=tokenizer,
        reward_funcs=cast(Any, ones),
        train_dataset=Dataset.from_list(task.problems("train", 200)),
        eval_dataset=Dataset.from_list(task.problems("selection", PROBLEMS)),
        callbacks=list(callbacks),
        peft_config=adapter,
        args=GRPOConfig(output_dir=str(out / "run"), **(settings | more)),
    )


def lines(trainer: Any) -> list[dict[str, float]]:
    """The log without jumps and without what a clock says."""
    return [
        {name: value for name, value in line.items() if not name.endswith(("time", "per_second"))}
        for line in trainer.state.log_history
        if "jump/steps" not in line
    ]


def same(first: weights.Copies, second: weights.Copies) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_scores_are_the_rewards_of_single_problems_in_the_same_order_every_time(tmp_path: Path) -> None:
    trainer = make(tmp_path, [])
    drawn = scoring.RandomState.of(trainer)
    collected = []
    for _ in range(2):
        drawn.put_back(trainer)
        collected.append(scoring.score(trainer, None))
    assert collected[0].shape == (PROBLEMS,)
    assert np.array_equal(collected[0], collected[1])
    drawn.put_back(trainer)
    assert trainer.evaluate()["eval_reward"] == pytest.approx(collected[0].mean(), abs=1e-6)
    assert "_calculate_rewards" not in vars(trainer)


@pytest.mark.slow
def test_a_run_jumps_and_gets_further_in_the_same_steps(tmp_path: Path) -> None:
    ends = []
    jump = JumpCallback(4)
    for callbacks in ([], [jump]):
        trainer = make(tmp_path, callbacks, learning_rate=3e-4)
        trainer.train()
        ends.append(trainer.evaluate()["eval_reward"])
    assert jump.looks[4].kept > 0
    assert jump.looks[4].p is not None
    assert ends[1] > ends[0] + 0.1


@pytest.mark.slow
def test_jumps_that_do_not_pay_change_no_weight_and_no_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below what the test can show, and above what it would take too few scores for a test for.
    monkeypatch.setattr(ladder, "LEVEL", 1e-5)
    collected = []
    for callbacks in ([], [JumpCallback(4)]):
        trainer = make(tmp_path, callbacks, eval_strategy="steps", eval_steps=4)
        trainer.train()
        collected.append((weights.copies(trainer.model), lines(trainer)))
    assert same(collected[0][0], collected[1][0])
    assert collected[0][1] == collected[1][1]
    (told,) = [line for line in trainer.state.log_history if "jump/steps" in line]
    # What waits for the trainer's next line is not in this one.
    assert not {"reward", "num_tokens", "entropy"} & set(told)


@pytest.mark.slow
def test_a_run_that_is_resumed_ends_where_it_would_have(tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 3}
    jump = JumpCallback(4)
    whole = make(tmp_path, [jump], **saving)
    whole.train()
    again = JumpCallback(4)
    resumed = make(tmp_path, [again], **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-3"))
    assert jump.looks[4].kept > 0
    assert again.looks == jump.looks
    assert same(weights.copies(whole.model), weights.copies(resumed.model))


class Engine:
    """Generates as TRL's vLLM does, from weights of its own that are pushed to it."""

    def __init__(self, trainer: Any) -> None:
        self.trained, self.own = trainer.model, copy.deepcopy(trainer.model)
        self.tokenizer, self.pushed, self.stale = trainer.processing_class, 0, 0

    def sync_weights(self) -> None:
        self.own.load_state_dict(self.trained.state_dict())
        self.pushed += 1

    def generate(self, prompts: list[list[int]], **_: Any) -> tuple[None, list[list[int]], list[Any], None]:
        self.stale += not same(weights.copies(self.own), weights.copies(self.trained))
        inputs = torch.tensor(prompts)
        written = self.own.generate(
            input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=True, max_new_tokens=task.DIGITS
        )[:, inputs.shape[1] :]
        return None, written.tolist(), [[[0.0]] * len(row) for row in written], None


@pytest.mark.slow
def test_every_rung_and_what_is_kept_is_pushed_to_the_engine_that_generates(tmp_path: Path) -> None:
    jump = JumpCallback(4)
    trainer = make(tmp_path, [jump])
    trainer.use_vllm, trainer._last_loaded_step, trainer.vllm_importance_sampling_correction = True, -1, False
    engine = trainer.vllm_generation = Engine(trainer)
    trainer.train()
    assert jump.looks[4].kept > 0
    assert engine.stale == 0
    # Staying, each rung, and what is left at the end of a look; the steps after a look need none.
    looked = sum(2 + len(look.rungs) for look in jump.looks.values())
    assert engine.pushed == looked + STEPS - sum(step < STEPS for step in jump.looks)


@pytest.mark.slow
def test_after_a_jump_answers_of_the_model_before_it_are_not_trained_on(tmp_path: Path) -> None:
    jump = JumpCallback(2)
    asked: list[int] = []
    trainer = make(tmp_path, [jump], max_steps=4, num_iterations=4)
    generate = trainer._generate_and_score_completions

    def generating(inputs: Any) -> Any:
        if trainer.model.training:
            asked.append(trainer.state.global_step)
        return generate(inputs)

    trainer._generate_and_score_completions = generating
    trainer.train()
    assert jump.looks[2].kept > 0
    assert asked == [0, 2]


def test_the_factors_of_an_adapter_jump_and_the_base_stays(tmp_path: Path) -> None:
    jump = JumpCallback(4)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    trainer = make(tmp_path, [jump], peft_config=adapter, max_steps=4, learning_rate=1e-2)
    base = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items() if "lora_" not in name}
    trainer.train()
    assert jump.looks[4].rungs
    assert all("lora_" in name for name in weights.copies(trainer.model))
    now = trainer.model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in base.items())


def test_the_example_trains(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    build_model(tokenizer, seed=0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    example = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "jump.py"))
    example["main"](str(tmp_path / "base"), str(tmp_path / "out"), 1)
    assert (tmp_path / "out/checkpoint-1/jump.pt").is_file()
