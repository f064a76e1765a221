"""End the training when the stop file of relex.yaml appears (transformers' Trainer, TRL, …).

    trainer.add_callback(StopOnFile("runs/qwen-math/STOP"))

Nothing but transformers and accelerate, which every Trainer has, is imported here.
"""

import logging
from os import PathLike
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_log = logging.getLogger(__name__)


class StopOnFile(TrainerCallback):
    """Ends the training at the end of the step at which the file is there, and saves a checkpoint of it.

    On every rank at the same step: the first one looks and tells the others, since a file may appear between the looks
    of two. A file that is there when the training begins was left by an earlier one: it is warned of, and obeyed only
    once it is replaced.
    """

    def __init__(self, path: str | PathLike[str]) -> None:
        self._path = Path(path)
        self._left: tuple[int, int] | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Remember the file that an earlier training left."""
        self._left = self._look() if state.is_world_process_zero else None
        if self._left is not None:
            _log.warning("stop file %s is older than this training and is ignored; write it anew to stop", self._path)

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Look, on the first rank, and let all of them stop and save."""
        there = False
        if state.is_world_process_zero:
            file = self._look()
            there = file is not None and file != self._left
        # Does nothing where there is one process.
        (stop,) = broadcast_object_list([there])
        if stop:
            _log.warning("stop file %s is there: the training ends after step %d", self._path, state.global_step)
            control.should_training_stop = True
            control.should_save = True

    def _look(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat()
        except OSError:
            # Not there; or a file system that does not answer now, which is no reason to end a training.
            return None
        return status.st_ino, status.st_mtime_ns
