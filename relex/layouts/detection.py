"""Which layout a step directory has: the first that finds its files, in order of preference."""

from typing import Protocol

from relex.errors import CheckpointIncompleteError
from relex.files.directory import Directory
from relex.layouts import dcp, dcp_safetensors, hf, peft, verl_fsdp
from relex.layouts.experts import stored_as
from relex.layouts.foreign import refuse_known
from relex.layouts.settled import check_settled
from relex.layouts.weights import Weights


class Layout(Protocol):
    """One module of this package."""

    NAME: str

    def find(self, step: Directory) -> Directory | None:
        """Return the directory in a step directory that holds the files of this layout, None when there is none."""

    def open_weights(self, directory: Directory, *, base: Weights) -> Weights:
        """Open the weights in it; raises CheckpointError when they are not whole."""


# What prime-rl writes last into a broadcast.
_STABLE = "STABLE"
LAYOUTS: tuple[Layout, ...] = (peft, verl_fsdp, hf, dcp_safetensors, dcp)


def open_complete(step: int, directory: Directory, *, run: Directory, base: Weights, now: float) -> Weights:
    """Open the checkpoint of `step` in the step directory `directory`, if it is complete at time `now`.

    `now` is in seconds since the epoch. Raises CheckpointIncompleteError, or CheckpointMismatchError when the files
    contradict each other or the base.
    """
    weights = open_any(directory, base=base)
    check_settled(weights, step=step, directory=directory, run=run, now=now)
    return weights


def open_any(directory: Directory, *, base: Weights) -> Weights:
    """Open the weights in a step directory, or in the directory itself; complete or not is not asked."""
    for layout in LAYOUTS:
        opened = layout.find(directory)
        if opened is not None:
            return stored_as(layout.open_weights(opened, base=base), base)
    refuse_known(directory)
    if _STABLE in directory.files():
        raise CheckpointIncompleteError(
            f"{directory} holds {_STABLE} and no weights: prime-rl sent them over the network. Set"
            ' weight_broadcast.type to "filesystem".'
        )
    raise CheckpointIncompleteError(
        f"{directory} has neither {hf.SINGLE_FILE} nor {hf.INDEX_FILE}. If the trainer is still writing, wait;"
        " otherwise point to the directory that holds the step directories."
    )
