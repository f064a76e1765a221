"""Supervised training of the demo's base model on the corpus whose authors disagree."""

import logging
import math

import torch
from torch.nn.functional import cross_entropy
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from flows.demo import task
from flows.demo.model import EOS, build_model, build_tokenizer

BATCH = 48
LEARNING_RATE = 4e-3
WARM_UP = 20
LOG_STEPS = 20

_log = logging.getLogger(__name__)


def supervise(
    steps: int, *, seed: int, name: task.Name = "sort", width: int = 128, layers: int = 2
) -> tuple[Qwen2ForCausalLM, Qwen2Tokenizer]:
    """Return a model trained for `steps` batches of 48 texts, and its tokenizer; the same seed gives the same model.

    After 400 steps nearly every answer is in one of the authors' two ways, and about a third are in the rewarded one.
    """
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed, width=width, layers=layers)
    texts = [row["prompt"] + row["answer"] + EOS for row in task.corpus(steps * BATCH, seed=seed, name=name)]
    tokens_NT = torch.tensor(tokenizer(texts).input_ids)  # N texts of equally many tokens T: nothing to pad
    prompt_length = tokens_NT.shape[1] - task.DIGITS - 1  # the answer and its <eos> follow

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    # The rate falls to zero because a model that stops at a high rate leans to one of the two directions by chance.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))
    model.train()
    for step, tokens_BT in enumerate(torch.split(tokens_NT, BATCH), start=1):
        logits_BTV = model(input_ids=tokens_BT[:, :-1]).logits[:, prompt_length - 1 :]
        loss = cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, prompt_length:].flatten())
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % LOG_STEPS == 0 or step == steps:
            _log.info("step %d/%d loss %.3f", step, steps, loss.item())
    return model, tokenizer


def rate(step: int, steps: int) -> float:
    """Return the part of the learning rate at a step: up over the first WARM_UP, then down to zero by half a cosine."""
    return min(1.0, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
