"""What a trainer's own files say of its run: how many steps it is planned for, how far apart it saves, and its model.

Trainer and TRL keep their state and their pickled arguments in every checkpoint, PEFT names the base in every adapter's
configuration, NeMo-RL writes its whole configuration there, and verl's lies where Hydra was told to put it.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from relex.errors import CheckpointError, UnreachableError
from relex.files.directory import Directory
from relex.layouts.hf import read_json
from relex.layouts.peft import CONFIG_FILE, find
from relex.layouts.pruning import trainer_settings
from relex.layouts.steps import step_directories

_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Planned:
    """A run as its trainer's files tell it; None and "" where they do not. `save_steps` are between two checkpoints.

    `base` is a path or a name on the Hub; `steps` are those of the checkpoints that are there.
    """

    steps: tuple[int, ...] = ()
    max_steps: int | None = None
    save_steps: int | None = None
    base: str = ""

    @property
    def spacing(self) -> int | None:
        """The steps from one checkpoint to the next: as the trainer says, else the fewest there are."""
        gaps = (later - earlier for earlier, later in pairwise(self.steps))
        return self.save_steps or min(gaps, default=None)


def planned(run: Directory) -> Planned:
    """Return what the files of a training run say of it; what cannot be read says nothing."""
    directories = step_directories(run)
    adapted, config_json, state = "", {}, {}
    for directory in reversed(directories.values()):
        with contextlib.suppress(OSError, UnreachableError, CheckpointError):
            adapted = _adapted(directory)
            config_json, state = (_read(directory, name) for name in ("config.json", _STATE))
            break
    _, config = trainer_settings(run)
    most = (
        _at(config, *place)
        for place in (("max_steps",), ("trainer", "total_training_steps"), ("grpo", "max_num_steps"))
    )
    saves = (
        _at(config, *place) for place in (("save_steps",), ("trainer", "save_freq"), ("checkpointing", "save_period"))
    )
    models = (
        adapted,
        _at(config, "policy", "model_name"),
        _at(config, "actor_rollout_ref", "model", "path"),
        config_json.get("_name_or_path"),
    )
    return Planned(
        tuple(directories),
        next(filter(None, map(_whole, (state.get("max_steps"), *most))), None),
        next(filter(None, map(_whole, (state.get("save_steps"), *saves))), None),
        next((model for model in models if isinstance(model, str) and model), ""),
    )


def _adapted(step: Directory) -> str:
    adapter = find(step)
    if adapter is None or CONFIG_FILE not in adapter.files():
        return ""
    named = read_json(adapter, CONFIG_FILE).get("base_model_name_or_path")
    return named if isinstance(named, str) else ""


def _read(directory: Directory, name: str) -> dict[str, Any]:
    return read_json(directory, name) if name in directory.files() else {}


def _whole(value: Any) -> int | None:
    return value if type(value) is int and value > 0 else None


def _at(config: Any, *place: str) -> Any:
    for part in place:
        config = config.get(part) if isinstance(config, Mapping) else None
    return config
