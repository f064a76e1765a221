"""GRPO on the demo's tasks: TRL's trainer, on one CPU core, writing TRL's own checkpoints."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from flows.demo import task

GENERATIONS = 8

_log = logging.getLogger(__name__)

StoredDtype = Literal["float32", "bfloat16"]
Schedule = Literal["constant", "linear", "cosine"]
Reward = Literal["exact", "credit"]


class RewardLog(TrainerCallback):
    """Says step and mean reward, where the trainer's own callback would print every metric."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:  # noqa: ARG002
        """Log the newest mean reward; the closing summary of a run has none."""
        logs = kwargs["logs"]
        if "reward" in logs:
            _log.info("step %d/%d reward %.3f", state.global_step, state.max_steps, logs["reward"])


class RoundingTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, computing in fp32 and storing its checkpoints in a dtype of choice.

    Mixed-precision trainers export bf16 weights from an fp32 master copy; this is that export.
    """

    def __init__(self, stored_dtype: StoredDtype, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stored_dtype: torch.dtype = getattr(torch, stored_dtype)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        source = state_dict or self.accelerator.unwrap_model(self.model).state_dict()
        # One rounded tensor per storage, so that tied weights stay tied and are written once.
        rounded = {tensor.data_ptr(): tensor.to(self.stored_dtype) for tensor in source.values()}
        super()._save(output_dir, {name: rounded[tensor.data_ptr()] for name, tensor in source.items()})


def train(
    base: Path,
    out: Path,
    *,
    name: task.Name,
    steps: int,
    save_steps: int,
    seed: int,
    prompts: int,
    learning_rate: float,
    schedule: Schedule,
    reward: Reward,
    lora: int,
    stored_dtype: StoredDtype,
) -> None:
    """Train the model in `base`, or an adapter of rank `lora` on it, and write `out/checkpoint-N` every `save_steps`.

    A step is `prompts` fresh training problems with 8 sampled answers each. The last step is always saved.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(seed)  # of the adapter's first factors
    trainer = RoundingTrainer(
        stored_dtype,
        model=model,
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=lora, lora_alpha=2 * lora, target_modules="all-linear") if lora else None,
        reward_funcs=_exact if reward == "exact" else _credit,
        train_dataset=Dataset.from_list(task.problems("train", steps * prompts, seed=seed, name=name)),
        args=GRPOConfig(
            output_dir=str(out),
            seed=seed,
            max_steps=steps,
            per_device_train_batch_size=prompts * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=task.DIGITS + 1,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_steps=save_steps,
            save_only_model=True,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RewardLog)
    trainer.train()


def _exact(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [task.reward(completion, right) for completion, right in zip(completions, answer, strict=True)]


def _credit(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [task.credit(completion, right) for completion, right in zip(completions, answer, strict=True)]
