"""Scoring inside a training: by the trainer's own evaluation or a function, without a trace in what is trained next.

Everything that an evaluation changes in a transformers or TRL trainer is put back: random states, modes of modules, the
control flow, the state, metrics that wait for the next log. Callbacks see nothing of it: one that stops early counts
the user's evaluations only.
"""

import copy
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import Trainer

from relex.callbacks.ladder import Scores

Score = Callable[[Trainer], float | Sequence[float]]

# What TRL's trainers collect for the next log.
_COLLECTED = ("_metrics", "_logs", "_pending_extra_logs", "_pending_metrics", "_stored_metrics", "_total_train_tokens")


@dataclass(frozen=True)
class RandomState:
    """The state of every generator that a step of training draws from."""

    python: Any
    numpy: Any
    cpu: Tensor
    device: Any

    @classmethod
    def of(cls, trainer: Trainer) -> "RandomState":
        """Return the present one."""
        module = _device_module(trainer)
        state = None if module is None else module.get_rng_state()
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state(), state)

    def put_back(self, trainer: Trainer) -> None:
        """Make it the present one."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.cpu)
        module = _device_module(trainer)
        if module is not None:
            module.set_rng_state(self.device)


def _device_module(trainer: Trainer) -> Any:
    kind = trainer.args.device.type
    return None if kind == "cpu" else torch.get_device_module(kind)


@contextmanager
def undisturbed(trainer: Any, *, silent: bool) -> Iterator[None]:
    """Put back what logging changes in a trainer, and with `silent` all that an evaluation does; no callback sees it.

    What waits for the trainer's next log is not there meanwhile.
    """
    handler, state, accelerator = trainer.callback_handler, trainer.state, trainer.accelerator
    control = dict(vars(trainer.control))
    collected = {name: getattr(trainer, name) for name in _COLLECTED if hasattr(trainer, name)}
    table = getattr(trainer, "log_completions", None)
    callbacks, eval_dataloader = handler.callbacks, handler.eval_dataloader
    fields, history, loaders = dict(vars(state)), len(state.log_history), len(accelerator._dataloaders)
    modes = [(module, module.training) for module in trainer.model_wrapped.modules()]
    drawn = RandomState.of(trainer)
    for name, value in collected.items():
        empty = {mode: defaultdict(list) for mode in value} if name == "_metrics" else copy.deepcopy(value)
        setattr(trainer, name, empty)
    if table is not None:
        trainer.log_completions = False
    if silent:
        handler.callbacks = []
    try:
        yield
    finally:
        for name, value in collected.items():
            setattr(trainer, name, value)
        if table is not None:
            trainer.log_completions = table
        vars(trainer.control).update(control)
        if silent:
            handler.callbacks, handler.eval_dataloader = callbacks, eval_dataloader
            vars(state).update(fields)
            del state.log_history[history:]
            del accelerator._dataloaders[loaders:]
            for module, training in modes:
                module.training = training
            drawn.put_back(trainer)


def score(trainer: Any, function: Score | None) -> Scores:
    """Return the scores of the model as it is now, higher is better, in the same order every time.

    By the function, or by the trainer's evaluation: the reward of each problem, the mean over its answers; else the
    loss of each batch, negated. Every process gets the first one's.
    """
    trainer.model_wrapped.eval()
    if function is None:
        scores = _evaluate(trainer)
    else:
        with torch.no_grad():
            scores = np.atleast_1d(np.asarray(function(trainer), dtype=np.float64)).ravel()
    (listed,) = broadcast_object_list([scores.tolist()])
    return np.asarray(listed, dtype=np.float64)


def _evaluate(trainer: Any) -> Scores:
    rewards: list[Tensor] = []
    losses: list[Tensor] = []
    with _replaced(trainer, "_calculate_rewards", _keeping(rewards, lambda rewards_AF: rewards_AF)):
        # Each process has a batch of its own.
        gather = trainer.accelerator.gather
        with _replaced(trainer, "prediction_step", _keeping(losses, lambda outputs: gather(outputs[0].reshape(1)))):
            metrics = trainer.evaluate()
    if rewards:
        return _by_problem(trainer, torch.cat(rewards).double().cpu())
    if "eval_reward" in metrics:
        return np.array([metrics["eval_reward"]], dtype=np.float64)
    return -torch.cat(losses).double().cpu().numpy()


def _by_problem(trainer: Any, rewards_AF: Tensor) -> Scores:
    """Return the (N,) mean reward of each problem from those of A answers by F reward functions, as TRL weighs them."""
    unscorable_A = rewards_AF.isnan().all(dim=1)
    reward_A = (rewards_AF * trainer.reward_weights.double().cpu()).nansum(dim=1)
    reward_A[unscorable_A] = torch.nan
    answers = int(getattr(trainer, "num_generations_eval", 1) or 1)
    if len(reward_A) % answers:
        answers = 1
    scores: Scores = reward_A.reshape(-1, answers).nanmean(dim=1).numpy()
    # Several processes repeat the first problems so that each has a full batch.
    dataset = trainer.eval_dataset
    return scores if isinstance(dataset, dict) or not hasattr(dataset, "__len__") else scores[: len(dataset)]


def _keeping(kept: list[Tensor], what: Callable[[Any], Tensor]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def around(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            kept.append(what(result))
            return result

        return call

    return around


@contextmanager
def _replaced(trainer: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let calls of a method of this trainer go through `around`, where it has such a method."""
    method = getattr(trainer, name, None)
    if method is None:
        yield
        return
    own = name in vars(trainer)
    setattr(trainer, name, around(method))
    try:
        yield
    finally:
        if own:
            setattr(trainer, name, method)
        else:
            delattr(trainer, name)
