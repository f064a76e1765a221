"""Jump and go on: a training that leaps along its own way where a score shows that it pays, and trains on from there.

    trainer.add_callback(JumpCallback(every=24))

At the end of a block of steps the line through the weights at its middle and at its end is scored further and further
on, as long as it gets better. The best point is kept when it is shown to be better than staying; otherwise the weights
are put back bit for bit, and the next look comes later. Steps, schedule and optimizer state go on as they were.
"""

import inspect
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from relex.callbacks import ladder, scoring, weights
from relex.callbacks.ladder import Climb, Scores
from relex.callbacks.scoring import Score, undisturbed

# Blocks from a look that did not pay to the next: twice as many each time, at most so many.
LONGEST_WAIT = 8

_log = logging.getLogger(__name__)


class JumpCallback(TrainerCallback):
    """Looks every `every` steps whether a jump ahead pays, and makes it.

    Jumps are scored by `score`, a function of the trainer that returns a number, or better one for each problem, always
    the same in the same order; higher is better. Without it by the trainer's own evaluation of its eval_dataset: the
    reward, where there is one, else the loss. Scores of single problems are tested in pairs (relex.callbacks.ladder);
    a single number has to be above that of staying. Memory: two copies of the trainable weights on the CPU.

    `looks` has what every look of this process found, by its step.
    """

    def __init__(self, every: int = 24, *, score: Score | None = None) -> None:
        if every < 2:
            raise ValueError(f"JumpCallback(every={every}): a block has no middle; give 2 or more, 24 for a start")
        self.every = every
        self.score = score
        self.looks: dict[int, Climb] = {}
        self._trainer: Any = None
        self._begin(0)

    def _begin(self, step: int) -> None:
        self._next = step + self.every
        self._wait = 1
        self._gained = 0
        self._middle: weights.Copies = {}

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Refuse what cannot be jumped with, and take up what a checkpoint holds."""
        self._trainer, resumed = _trainer_of_this_call()
        _check(self._trainer, self.score)
        self._begin(state.global_step)
        if state.global_step:
            self._resume(kwargs["model"], state.global_step, resumed)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Copy the weights in the middle of a block, and look at its end."""
        if state.global_step == self._next - self.every // 2:
            self._middle = weights.copies(kwargs["model"])
        elif state.global_step >= self._next:
            self._look(kwargs["model"], state.global_step)

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,
    ) -> None:
        """Add to the checkpoint what a training that goes on from there needs for the same looks."""
        directory = Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        shards = weights.sharded(kwargs["model"])
        if args.save_only_model or not directory.is_dir() or not (args.should_save or shards):
            return
        content = {"every": self.every, "next": self._next, "wait": self._wait, "gained": self._gained}
        file = directory / _file_name(args, shards=shards)
        partial = file.with_name(f".{file.name}.partial")
        torch.save({**content, "middle": self._middle}, partial)
        partial.replace(file)

    def on_train_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Let go of the trainer and the copies."""
        self._trainer, self._middle = None, {}

    def _resume(self, model: torch.nn.Module, step: int, checkpoint: str | None) -> None:
        args = self._trainer.args
        directory = Path(checkpoint) if checkpoint else Path(str(args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{step}")
        file = directory / _file_name(args, shards=weights.sharded(model))
        block: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True) if file.is_file() else {}
        late = bool(block) and step >= block["next"] - block["every"] // 2
        usable = bool(block) and block["every"] == self.every and (not late or weights.fits(block["middle"], model))
        if all(gather_object([usable])):
            self._next, self._wait, self._gained = block["next"], block["wait"], block["gained"]
            self._middle = block["middle"]
        else:
            _log.warning("%s has no block of %d steps to go on with: one begins at step %d", file, self.every, step)

    def _look(self, model: torch.nn.Module, step: int) -> None:
        began = time.monotonic()
        trainer, now = self._trainer, weights.copies(model)
        span = self.every // 2
        jump = 0
        try:
            with undisturbed(trainer, silent=True):
                drawn = scoring.RandomState.of(trainer)

                def score(steps: int) -> Scores | None:
                    # The same draws for every rung, so that rungs differ by their weights alone.
                    drawn.put_back(trainer)
                    if not self._place(model, now, steps / span):
                        return None
                    return scoring.score(trainer, self.score)

                climb = ladder.climb(score, ladder.rungs(self.every))
            jump = climb.kept
        finally:
            # Also when scoring fails or is interrupted: then the weights are those before it.
            self._place(model, now, jump / span)
        self.looks[step] = climb
        self._gained += jump
        self._wait = 1 if jump else min(2 * self._wait, LONGEST_WAIT)
        self._next, self._middle = step + self._wait * self.every, {}
        if jump and getattr(trainer, "_buffered_inputs", None) is not None:
            # TRL's answers of the model before the jump.
            trainer._buffered_inputs = None
        self._tell(climb, step, time.monotonic() - began)

    def _place(self, model: torch.nn.Module, now: weights.Copies, share: float) -> bool:
        """Go on by `share` of the way from the middle to now, in TRL's generation engine too where there is one."""
        finite = weights.place(model, now, self._middle, share=share)
        # Not when weights are put back, which may be on one process only.
        if share and weights.sharded(model):
            finite = all(gather_object([finite]))
        if finite and getattr(self._trainer, "use_vllm", False):
            self._trainer.vllm_generation.sync_weights()
            self._trainer._last_loaded_step = self._trainer.state.global_step
        return finite

    def _tell(self, climb: Climb, step: int, seconds: float) -> None:
        tried = ", ".join(f"{rung.steps}: {rung.score:.4f}" for rung in climb.rungs)
        chance = "" if climb.p is None else f" (p = {climb.p:.4f})"
        _log.info(
            "step %d: %s%s; staying scores %.4f, jumps by steps %s; %.1f s; %d steps gained so far",
            *(step, f"jumped {climb.kept} steps" if climb.kept else "stayed", chance, climb.stay, tried or "none"),
            *(seconds, self._gained),
        )
        best = max((rung.score for rung in climb.rungs if math.isfinite(rung.score)), default=climb.stay)
        logs = {
            "jump/steps": climb.kept,
            "jump/gained": self._gained,
            "jump/stay": climb.stay,
            "jump/best": best,
            "jump/rungs": len(climb.rungs),
            "jump/seconds": round(seconds, 3),
        }
        with undisturbed(self._trainer, silent=False):
            self._trainer.log(logs if climb.p is None else logs | {"jump/p": climb.p})


def _trainer_of_this_call() -> tuple[Any, str | None]:
    """Return the trainer that is calling, which callbacks are not told, and the checkpoint that it resumes from."""
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back
    raise ValueError("JumpCallback works in transformers' Trainer and what is derived from it, and none is calling it")


def _check(trainer: Any, score: Score | None) -> None:
    if score is None and trainer.eval_dataset is None:
        raise ValueError(
            "JumpCallback has nothing to score jumps with: give the trainer an eval_dataset, or JumpCallback a score"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "JumpCallback under DeepSpeed: its copy of the weights in the optimizer would undo a jump; use FSDP"
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in trainer.model_wrapped.modules()):
        raise ValueError("JumpCallback under FSDP 1: its flattened weights cannot be moved; set fsdp_version to 2")
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    if callable(getattr(optimizer, "eval", None)):
        raise ValueError(  # noqa: TRY004
            f"JumpCallback with {type(optimizer).__name__}: it evaluates other weights than it trains; use AdamW"
        )


def _file_name(args: TrainingArguments, *, shards: bool) -> str:
    return f"jump_{args.process_index}.pt" if shards else "jump.pt"
