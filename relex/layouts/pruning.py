"""How many checkpoints the trainer keeps, told from the settings beside them, and whether a window survives it.

Trainer and TRL pickle their arguments into every checkpoint (read here without executing them), NeMo-RL writes its
whole configuration there, verl's lies where Hydra was told to put it, and prime-rl's broadcasts never stay.
"""

import contextlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import yaml

from relex.errors import CheckpointError, UnreachableError
from relex.files.directory import Directory, FileIdentity
from relex.formats.pickled import Made
from relex.formats.torch_file import read_torch_file
from relex.layouts.hf import descend
from relex.layouts.steps import step_directories

# The settings of a run are a few kilobytes.
_MOST_BYTES = 1 << 20
# A trainer writes none. Each may double what comes before it.
_MOST_ALIASES = 12
_ARGUMENTS = "training_args.bin"
_CONFIG = "config.yaml"
_HYDRA = ".hydra"
_UNREADABLE = (CheckpointError, OSError, ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError)

# By the first letters of a step directory's name: what its trainer calls the number of checkpoints it keeps.
_SETTINGS = {
    "checkpoint-": "save_total_limit",
    "step_": "checkpointing.keep_top_k",
    "global_step": "trainer.max_actor_ckpt_to_keep",
}
# prime-rl names its step directories as NeMo-RL does; of its checkpoints this is inside, of its broadcasts this.
_PRIME_RL = "trainer"
_PRIME_RL_SETTING = "ckpt.keep_last"
_BROADCAST = "STABLE"


@dataclass(frozen=True)
class Limit:
    """A trainer's setting that makes it delete checkpoints: how many it keeps, and how many steps apart they are.

    `spacing` is None where the file does not say.
    """

    file: str
    setting: str
    kept: int
    spacing: int | None


def setting_of(directory: Directory) -> str:
    """Return what the trainer of a step directory calls the number of checkpoints it keeps, "" where it has none."""
    if _is_broadcast(directory):
        return ""
    with contextlib.suppress(OSError, UnreachableError):
        if directory.name.startswith("step_") and _PRIME_RL in directory.children():
            return _PRIME_RL_SETTING
    settings = [setting for prefix, setting in _SETTINGS.items() if directory.name.startswith(prefix)]
    return settings[0] if settings else "the trainer's number of kept checkpoints"


def find_limit(run: Directory) -> Limit | None:
    """Return the limit that the files of a training run show, None when they show none."""
    file, content = trainer_settings(run)
    if file.endswith(_ARGUMENTS):
        return _limit(file, "save_total_limit", content.get("save_total_limit"), content.get("save_steps"))
    nemo, verl = _section(content, "checkpointing"), _section(content, "trainer")
    kept = 1 if verl.get("remove_previous_ckpt_in_save") is True else verl.get("max_actor_ckpt_to_keep")
    return _limit(file, "checkpointing.keep_top_k", nemo.get("keep_top_k"), nemo.get("save_period")) or _limit(
        file, "trainer.max_actor_ckpt_to_keep", kept, verl.get("save_freq")
    )


def trainer_settings(run: Directory) -> tuple[str, Mapping[str, Any]]:
    """Return the newest file with the trainer's own settings, and what it says; "" and nothing where there is none."""
    steps = list(step_directories(run).values())
    for directory in reversed(steps):
        # What cannot be read says nothing, and whoever opens the checkpoint is told.
        with contextlib.suppress(OSError, UnreachableError):
            present = directory.files()
            for name in (_ARGUMENTS, _CONFIG):
                if name in present:
                    return _read(directory, present[name])
    with contextlib.suppress(OSError, UnreachableError):
        hydra = descend(run, _HYDRA)
        present = hydra.files() if hydra is not None else {}
        if hydra is not None and _CONFIG in present:
            return _read(hydra, present[_CONFIG])
    return "", {}


def warning(run: Directory, *, window: int) -> str:
    """Return one line when the trainer deletes checkpoints that a window up to step `window` needs, else nothing."""
    directories = step_directories(run)
    if any(map(_is_broadcast, directories.values())):
        return f"{run}: prime-rl deletes each of its broadcasts two steps later. Set pin: link in relex.yaml"
    limit = find_limit(run)
    if limit is None:
        return ""
    steps = sorted({0, *directories})
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    spacing = min([*gaps[1:], limit.spacing] if limit.spacing else gaps, default=window)
    needed = math.ceil(window / spacing)
    if limit.kept >= needed:
        return ""
    return (
        f"{limit.file}: {limit.setting} is {limit.kept}, and a window of {window} steps with a checkpoint every"
        f" {spacing} needs {needed}: the trainer will delete the first of them. Set {limit.setting} to {needed} or"
        " more, or pin: link in relex.yaml"
    )


def _is_broadcast(step: Directory) -> bool:
    with contextlib.suppress(OSError, UnreachableError):
        return _BROADCAST in step.files()
    return False


@lru_cache(maxsize=1024)  # a watcher asks every few seconds
def _read(directory: Directory, file: FileIdentity) -> tuple[str, Mapping[str, Any]]:
    where = f"{directory}/{file.name}"
    content: Any = None
    # It is being written, or somebody else's file of that name: what it would have said is a hint.
    with contextlib.suppress(*_UNREADABLE):
        if file.size <= _MOST_BYTES:
            content = _arguments(directory, file) if file.name == _ARGUMENTS else _config(directory.read(file.name))
    return where, content if isinstance(content, dict) else {}


def _arguments(directory: Directory, file: FileIdentity) -> Any:
    made = read_torch_file(directory, file, unknown="stub")
    return made.state if isinstance(made, Made) else None


def _config(text: bytes) -> Any:
    if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > _MOST_ALIASES:
        return None
    return yaml.safe_load(text)


def _section(config: Any, name: str) -> Mapping[str, Any]:
    section = config.get(name) if isinstance(config, dict) else None
    return section if isinstance(section, dict) else {}


def _limit(file: str, setting: str, kept: Any, spacing: Any) -> Limit | None:
    if type(kept) is not int or kept < 1:
        return None
    return Limit(file, setting, kept, spacing if type(spacing) is int and spacing > 0 else None)
