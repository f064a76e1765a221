"""A GRPO run that keeps one checkpoint only: `python -m tests.integration.pruning_trainer BASE OUT STEPS SECONDS LOG`.

LOG gets one line for each checkpoint the trainer has saved: its step and the digest of its weights. A step takes
SECONDS more than its tiny model needs, and none begins while LOG.paused is there.
"""

import json
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from flows.demo import task

PROMPTS = 4
GENERATIONS = 4


class DigestLog(TrainerCallback):
    """Says what was saved, before the next step deletes it."""

    def __init__(self, log: Path, seconds: float) -> None:
        self.log = log
        self.seconds = seconds

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        time.sleep(self.seconds)
        while self.log.with_suffix(".paused").exists():
            time.sleep(0.05)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        weights = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / "model.safetensors"
        with self.log.open("a") as file:
            file.write(json.dumps([state.global_step, sha256(weights.read_bytes()).hexdigest()]) + "\n")


def rewards(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    return [task.reward(completion, right) for completion, right in zip(completions, answer, strict=True)]


def main(base: Path, out: Path, steps: int, seconds: float, log: Path) -> None:
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=rewards,
        train_dataset=Dataset.from_list(task.problems("train", steps * PROMPTS, seed=0)),
        args=GRPOConfig(
            output_dir=str(out),
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=task.DIGITS + 1,
            learning_rate=1e-4,
            beta=0.0,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_steps=1,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.add_callback(DigestLog(log, seconds))
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), Path(sys.argv[5]))
