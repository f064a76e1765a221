"""When the files of a checkpoint are all there and nobody writes them any more.

On a disk: the trainer's marker, which it writes last, parses and is not older than the newest weight file, or, with no
marker, nothing changed for a while. An object store shows files whole but in any order: nothing changed for a while. A
commit is complete. In all of them every file is as long as its header says (the layouts see to it), and has no hole.
"""

import json
from collections.abc import Mapping
from functools import lru_cache

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity, Kind
from relex.layouts.hf import descend
from relex.layouts.weights import Weights

QUIET_SECONDS = 30.0

# What trainers write last into a step directory: Trainer and TRL; open-instruct; prime-rl.
_STATE = "trainer_state.json"
_MARKERS = (_STATE, ".checkpoint_complete", "STABLE")
# What verl with Megatron writes last, into the directory of a role.
_CONTENTS = "ckpt_contents.json"
_ROLE = "actor"
# What torch.distributed.checkpoint writes last, beside the files of a rank; it is among those that are read.
_METADATA = ".metadata"
_INCOMPLETE_MARKER = "checkpoint-is-incomplete.txt"
# What verl writes last, beside its step directories: the number of the latest one.
TRACKER = "latest_checkpointed_iteration.txt"
_TRACKED = "global_step_"
_MOST_TRACKER_BYTES = 64
_MOST_DIGITS = 15


def check_settled(weights: Weights, *, step: int, directory: Directory, run: Directory, now: float) -> None:
    """Raise CheckpointIncompleteError unless the weights in step directory `directory` are finished at time `now`.

    `now` is in seconds since the epoch.
    """
    _refuse_defects(weights)
    kind = weights.directory.kind
    present = directory.files()
    if _INCOMPLETE_MARKER in present:
        raise CheckpointIncompleteError(f"{directory} holds {_INCOMPLETE_MARKER}: its writer has not finished. Wait.")
    if _STATE in present:
        _check_state(directory, present[_STATE], step)
    if kind is Kind.COMMIT:
        return
    newest = max(file.mtime_ns for file in weights.files)
    if kind is Kind.DISK:
        for file in weights.files:
            if file.name == _METADATA:
                _refuse_older(file, newest, weights.directory)
                return
        for name in _MARKERS:
            if name in present:
                _refuse_older(present[name], newest, directory)
                return
        role = descend(directory, _ROLE)
        listed = role.files() if role is not None else present
        if _CONTENTS in listed:
            _refuse_older(listed[_CONTENTS], newest, role or directory)
            return
        if directory.name.startswith(_TRACKED):
            siblings = run.files()
            if TRACKER in siblings:
                _check_tracker(run, siblings, step=step, newest=newest, directory=directory)
                # Else it is written again by a run that was resumed before it: the tracker will say so, or it is old.
                if newest <= siblings[TRACKER].mtime_ns:
                    return
    age = now - newest / 1e9
    if age < QUIET_SECONDS:
        what = f"has no {_STATE} and changed" if kind is Kind.DISK else "changed"
        raise CheckpointIncompleteError(
            f"{directory} {what} {max(age, 0.0):.0f} s ago; without the trainer's marker a checkpoint counts as"
            f" complete after {QUIET_SECONDS:.0f} quiet seconds. Wait."
        )


def _refuse_defects(weights: Weights) -> None:
    for file in weights.files:
        hole = weights.directory.hole(file)
        if hole is not None:
            raise CheckpointIncompleteError(
                f"{weights.directory}/{file.name} has a hole at byte {hole} of {file.size}: that part has not been"
                " written yet. Wait for the trainer."
            )


def _refuse_older(marker: FileIdentity, newest: int, directory: Directory) -> None:
    if marker.mtime_ns < newest:
        raise CheckpointIncompleteError(
            f"{directory}: the weights are newer than {marker.name}, so they are being written again. Wait for the"
            f" trainer; if the directory was copied, touch {marker.name}."
        )


def _check_tracker(
    run: Directory, siblings: Mapping[str, FileIdentity], *, step: int, newest: int, directory: Directory
) -> None:
    text = run.read(TRACKER, 0, _MOST_TRACKER_BYTES).decode(errors="replace").strip()
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise CheckpointIncompleteError(f"{run}/{TRACKER} reads {text!r}: the trainer is writing it. Wait.")
    if int(text) < step:
        raise CheckpointIncompleteError(
            f"{directory}: {TRACKER} says the latest finished step is {text}. Wait for the trainer; if it resumed from"
            f" there, step {step} will be written again."
        )
    if int(text) == step:
        _refuse_older(siblings[TRACKER], newest, directory)


def _check_state(directory: Directory, state: FileIdentity, step: int) -> None:
    """Refuse a directory whose trainer was at another step than its name says."""
    said = _global_step(directory, state)
    if said is not None and said != step:
        raise CheckpointMismatchError(
            f"{directory} is step {step} by its name, and {_STATE} in it says {said}: it was renamed, or copied over"
            " another. Give it its own name, or delete it."
        )


@lru_cache(maxsize=4096)  # it grows with the run, and a watcher looks at every checkpoint every few seconds
def _global_step(directory: Directory, state: FileIdentity) -> int | None:
    try:
        content = json.loads(directory.read(state.name))
    except (ValueError, RecursionError) as error:
        raise CheckpointIncompleteError(
            f"{directory}/{state.name} ({state.size} bytes) does not parse ({error}): the trainer is writing it. Wait."
        ) from error
    said = content.get("global_step") if isinstance(content, dict) else None
    return said if type(said) is int else None
