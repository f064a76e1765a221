"""The learning rate of a run: what its trainer wrote beside the last checkpoint, or what the weights tell.

Under Adam no weight moves faster than about the learning rate a step, and in a few dozen steps some weights move always
the same way: the largest change over the number of steps is the rate, averaged over a schedule (2 to 4 % above it after
24 steps of the demo's runs).
"""

import contextlib
import json
import math
from dataclasses import dataclass

import torch

from relex.errors import RelexError, TargetError
from relex.store import Checkpoint
from relex.streaming import Unit, Workspace, in_order, units, workspaces
from relex.trajectory import Trajectory

# What transformers' Trainer, and so TRL, writes beside every checkpoint.
_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Rate:
    """The rate a step, and who told it."""

    value: float
    told_by: str


def learning_rate(trajectory: Trajectory, *, memory: int, threads: int) -> Rate:
    """Return the learning rate; the weights are read only when the trainer did not write it down.

    Raises TargetError where neither tells: for adapters, and for checkpoints stored in 16 bits.
    """
    last = trajectory.checkpoints[-1]
    logged = _logged(last)
    if logged is not None:
        return Rate(logged, f"{_STATE} of step {last.step}")
    moving = [spec for spec in trajectory.tensors if spec.moves and not spec.unchanged]
    why = ""
    if any(spec.relative for spec in moving):
        why = "the run is of adapters, whose products do not move by the learning rate"
    elif any(torch.finfo(spec.dtype).bits < 32 for spec in moving):
        why = "the checkpoints are stored in 16 bits, whose rounding is larger than a step"
    if why:
        raise TargetError(
            f"the learning rate is not known: no {_STATE} with it lies in {last.weights.directory}, and {why}. Give it"
            " as the method's lr."
        )
    change = _largest_change(trajectory, memory=memory, threads=threads)
    if not change > 0:
        raise TargetError(f"the learning rate is not known: step {last.step} is the base itself. Give lr.")
    return Rate(change / last.step, f"the weights of step {last.step}")


def _logged(checkpoint: Checkpoint) -> float | None:
    """Return the last positive learning rate of the trainer's log up to the checkpoint, None when it has none."""
    directory = checkpoint.weights.directory
    with contextlib.suppress(OSError, ValueError, TypeError, LookupError, AttributeError, RelexError):
        if _STATE not in directory.files():
            return None
        history = json.loads(directory.read(_STATE))["log_history"]
        rates = [
            float(entry["learning_rate"])
            for entry in history
            if "learning_rate" in entry and entry.get("step", 0) <= checkpoint.step
        ]
        known = [rate for rate in rates if math.isfinite(rate) and rate > 0]
        return known[-1] if known else None
    return None


def _largest_change(trajectory: Trajectory, *, memory: int, threads: int) -> float:
    """Return the largest absolute difference between an element of the last checkpoint and of the base."""
    spaces = workspaces(trajectory, 1, memory=memory, threads=threads)
    last = len(trajectory.checkpoints) - 1
    pieces = [unit for unit in units(trajectory) if trajectory.tensors[unit.tensor].moves]

    def work(space: Workspace, unit: Unit) -> float:
        return max(
            (
                float(deltas.abs().max())
                for block in space.blocks(trajectory, unit, [last])
                for _, deltas in space.subtract(block)
            ),
            default=0.0,
        )

    return max((largest for _, largest in in_order(work, pieces, spaces)), default=0.0)
