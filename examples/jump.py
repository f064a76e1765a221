"""GRPO with TRL that leaps ahead where it pays: `python examples/jump.py BASE OUT`.

BASE is a model of the demo's, which python -m flows.demo.pretrain --out BASE writes; put your own model, problems and
reward here. What JumpCallback adds to the script are the two lines that are marked.
"""

import logging
import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from flows.demo import task
from relex.callbacks import JumpCallback


def exact(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """Reward the right answers."""
    return [task.reward(completion, right) for completion, right in zip(completions, answer, strict=True)]


def main(base: str, out: str, steps: int = 48) -> None:
    """Train for so many steps; each look is a line of the log."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=exact,
        train_dataset=Dataset.from_list(task.problems("train", 32 * steps)),
        eval_dataset=Dataset.from_list(task.problems("selection", 128)),  # what jumps are scored with
        args=GRPOConfig(
            output_dir=out,
            max_steps=steps,
            per_device_train_batch_size=256,
            per_device_eval_batch_size=128,
            num_generations=8,
            num_generations_eval=1,
            max_completion_length=task.DIGITS + 1,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_steps=24,
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.add_callback(JumpCallback(every=24))  # the line
    trainer.train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
