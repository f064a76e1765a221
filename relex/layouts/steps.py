"""Which names in the store of a training run are step directories, and of which training step."""

import re
from collections import Counter
from collections.abc import Collection

from relex.files.directory import Directory

# What trainers call them, and what is to be added to the number to get the count of finished training steps.
_NAMES = (
    (re.compile(r"checkpoint-(\d+)"), 0),  # Trainer, TRL
    (re.compile(r"step_(\d+)"), 0),  # NeMo-RL, prime-rl, open-instruct
    (re.compile(r"global_step_?(\d+)"), 0),  # verl
    (re.compile(r"global_step(\d+)_hf"), 0),  # OpenRLHF
    (re.compile(r"hf_(\d+)"), 1),  # slime counts rollouts from 0
    (re.compile(r"epoch\d+epochstep\d+globalstep(\d+)"), 1),  # AReaL counts from 0
    (re.compile(r"iter_(\d+)"), 0),  # Megatron-LM, to refuse it by name
)
# A number of more is no count of steps, and a name like any other.
_MOST_DIGITS = 15


def step_names(run: Directory) -> dict[int, tuple[str, ...]]:
    """Return the names of the step directories of a training run by ascending training step.

    Only one of several for a step can be meant. Other names are not looked at.
    """
    names: dict[int, tuple[str, ...]] = {}
    for name in run.children():
        step = _step(name)
        # What prime-rl has before the first step is the base.
        if step:
            names[step] = (*names.get(step, ()), name)
    return dict(sorted(names.items()))


def step_directories(run: Directory) -> dict[int, Directory]:
    """Return the step directories of a training run by ascending training step, of several for a step the first."""
    return {step: run.checkpoint(names[0]) for step, names in step_names(run).items()}


def doubtful(names: Collection[str]) -> dict[str, str]:
    """Return which names of the step directories of one run cannot be trusted to be its own, each with the reason.

    A run has one trainer, which names them one way: the way that fewer are named is somebody else's, and with as many
    of each nobody can tell.
    """
    ways = {name: next(place for place, (pattern, _) in enumerate(_NAMES) if pattern.fullmatch(name)) for name in names}
    counts = Counter(ways.values())
    first = {way: name for name, way in reversed(ways.items())}
    reasons = {}
    for name, way in ways.items():
        other = max((one for one in counts if one != way), key=lambda one: counts[one], default=way)
        if not name.isascii():
            reasons[name] = f"{name!a} is no name that a trainer gives: its number has other digits than 0 to 9"
        elif other != way and counts[other] >= counts[way]:
            reasons[name] = f"{name} lies beside {first[other]}, which another trainer names so: they are of two runs"
    return {name: f"{reason}. Give each run a directory of its own." for name, reason in reasons.items()}


def _step(name: str) -> int | None:
    for pattern, offset in _NAMES:
        match = pattern.fullmatch(name)
        if match is not None and len(match[1]) <= _MOST_DIGITS:
            return int(match[1]) + offset
    return None
