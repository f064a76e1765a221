"""PEFT adapters: `adapter_model.safetensors` and `adapter_config.json`, LoRA in each form that leaves the base alone.

Trainer's and TRL's `checkpoint-N` of an adapter run, and verl's `global_step_N/actor/lora_adapter`.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity
from relex.formats.safetensors_header import read_header
from relex.layouts.adapter_settings import MERGE, AdapterSettings, read_settings
from relex.layouts.factors import AdapterWeights, Factor, LowRank, Unchanged
from relex.layouts.foreign import refuse_known
from relex.layouts.hf import descend, read_json
from relex.layouts.weights import TensorEntry, Weights, embedding_name, is_turned, knows_turned, whole

NAME = "peft"

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."

_PLACES = ("", "actor/lora_adapter", "lora_adapter")
HEAD = "lm_head.weight"
_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.default)?(\.weight)?"
)


@dataclass(frozen=True)
class _Opened:
    """One adapter while it is being read: its settings, its tensors by their names, its base, and where both lie."""

    directory: Directory
    settings: AdapterSettings
    stored: Mapping[str, TensorEntry]
    base: Weights
    config_file: str
    weights_file: str

    @property
    def embedding(self) -> str:
        """The embedding that is the output head too, "" when the two are not tied."""
        return "" if HEAD in self.base.tensors else embedding_name(self.base.tensors) or ""


def find(step: Directory) -> Directory | None:
    """Return the directory in the step directory that holds an adapter, None when there is none."""
    for place in _PLACES:
        directory = descend(step, place)
        if directory is not None and directory.files().keys() & {WEIGHTS_FILE, CONFIG_FILE}:
            return directory
    return None


def open_weights(directory: Directory, *, base: Weights) -> AdapterWeights:
    """Read the header and the configuration of an adapter.

    Raises CheckpointIncompleteError when it is not whole, CheckpointMismatchError when it does not fit the base or is
    of a kind that is not read.
    """
    present = directory.files()
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if name not in present:
            refuse_known(directory)
            raise CheckpointIncompleteError(
                f"{directory} holds an adapter without {name}. If the trainer is still writing, wait; otherwise save"
                " it again."
            )
    content = read_json(directory, CONFIG_FILE)
    stored = {
        name: whole(name, entry.dtype, entry.shape, WEIGHTS_FILE, entry.offset)
        for name, entry in read_header(directory, present[WEIGHTS_FILE]).tensors.items()
    }
    files = (present[CONFIG_FILE], present[WEIGHTS_FILE])
    return put_together(directory, content, stored, files, base=base)


def put_together(
    directory: Directory,
    content: Mapping[str, Any],
    stored: Mapping[str, TensorEntry],
    files: tuple[FileIdentity, ...],
    *,
    base: Weights,
    config_file: str = CONFIG_FILE,
    weights_file: str = WEIGHTS_FILE,
) -> AdapterWeights:
    """Return an adapter from its adapter_config.json and its tensors by the names that peft gives them.

    `config_file` and `weights_file` say where they are stored. Raises CheckpointMismatchError as `open_weights` does.
    """
    settings = read_settings(content, where=f"{directory}/{config_file}")
    named = {canonical(name): replace(entry, name=canonical(name)) for name, entry in stored.items()}
    opened = _Opened(directory, settings, named, base, config_file, weights_file)
    tensors: dict[str, TensorEntry] = {
        name: Unchanged(name, entry.dtype, entry.shape, ()) for name, entry in base.tensors.items()
    }
    adapted = _adapted(opened)
    replaced, keys = _replaced(opened)
    alias = replaced.pop(HEAD, None) if opened.embedding else None
    _check_tied(opened, adapted, alias)
    tensors |= adapted | replaced
    return AdapterWeights(NAME, directory, tensors, files, alias, base.config, base, content, keys)


def canonical(name: str) -> str:
    """Return the name of a tensor without what peft and FSDP wrap around the model."""
    return name.replace("_fsdp_wrapped_module.", "").removeprefix(PREFIX)


def is_factor(name: str) -> bool:
    """Whether a tensor of this name belongs to what is added to a module."""
    return _LORA.fullmatch(canonical(name)) is not None


def _adapted(opened: _Opened) -> dict[str, TensorEntry]:
    """Return what is stored as factors, by the name of the base's tensor."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in opened.stored.items():
        match = _LORA.fullmatch(name)
        if match is not None:
            modules.setdefault(match["module"], {})[match["part"]] = entry
    settings, where = opened.settings, f"{opened.directory}/{opened.config_file}"
    if settings.ensure_weight_tying and opened.embedding:
        # A tied head is given the embedding's own factors.
        modules.pop(HEAD.removesuffix(".weight"), None)
    ranks, alphas = settings.ranks(modules, where=where), settings.alphas(modules, where=where)
    adapted: dict[str, TensorEntry] = {
        f"{module}.weight": _low_rank(opened, module, parts, rank=ranks.of(module), alpha=alphas.of(module))
        for module, parts in modules.items()
    }
    others = sorted(modules.keys() - settings.targets(modules, where=where))
    if others:
        raise CheckpointMismatchError(
            f"{where} does not target {others[0]}, which has factors in {opened.weights_file}: peft would leave them"
            " out. Save the adapter again."
        )
    return adapted


def _low_rank(opened: _Opened, module: str, parts: Mapping[str, TensorEntry], *, rank: float, alpha: float) -> LowRank:
    directory, settings, name = opened.directory, opened.settings, f"{module}.weight"
    needed = [side for side in ("A", "B", "embedding_A", "embedding_B") if side in parts]
    wanted = {"magnitude_vector"} if settings.use_dora else set()
    if needed not in (["A", "B"], ["embedding_A", "embedding_B"]) or parts.keys() - set(needed) != wanted:
        raise CheckpointMismatchError(
            f"{directory}/{opened.weights_file} holds of {module} only"
            f" {', '.join(f'lora_{part}' for part in sorted(parts))}, with use_dora {str(bool(wanted)).lower()}. Save"
            " the adapter again."
        )
    if name == HEAD and opened.embedding:
        raise _tied(opened, "lm_head", opened.embedding)
    if name not in opened.base.tensors:
        raise CheckpointMismatchError(
            f"{directory}: the adapter changes {module}, and the base {opened.base.directory} has no {name}. Give the"
            " base this run was started from."
        )
    a, b = (parts[side] for side in needed)
    shape = opened.base.tensors[name].shape
    embedding = needed[0] == "embedding_A"
    straight = _fits(shape, b, a) and not embedding
    turned = _fits(shape[::-1], b, a)
    magnitude = parts.get("magnitude_vector")
    if straight and turned:
        straight = _stored_straight(opened, module)
    length = shape[0 if straight else 1] if len(shape) == 2 else 0
    if not (straight or turned) or (magnitude is not None and magnitude.shape != (length,)):
        held = " and ".join(f"lora_{part} {list(entry.shape)}" for part, entry in sorted(parts.items()))
        raise CheckpointMismatchError(
            f"{directory}: {module} has {held}, and {name} of the base {opened.base.directory} has shape"
            f" {list(shape)}. Give the base this run was started from; with ZeRO-3 or FSDP, gather before saving."
        )
    if a.shape[0] != rank:
        raise CheckpointMismatchError(
            f"{directory}: {module} has rank {a.shape[0]} in {opened.weights_file} and {rank:g} in"
            f" {opened.config_file}. Save the adapter again."
        )
    scale = alpha / (math.sqrt(rank) if settings.use_rslora else rank)
    left, right = (Factor(b, False), Factor(a, True)) if straight else (Factor(a, True), Factor(b, False))
    return LowRank(name, torch.float32, shape, (), left, right, scale, magnitude, embedding)


def _stored_straight(opened: _Opened, module: str) -> bool:
    """Whether a square layer is stored as (out, in): peft goes by its class, whatever fan_in_fan_out says."""
    if is_turned(module, opened.base.config):
        return False
    if opened.settings.fan_in_fan_out and not knows_turned(opened.base.config):
        raise CheckpointMismatchError(
            f"{opened.directory}/{opened.config_file} sets fan_in_fan_out, and of {module}, which is square, in a"
            f" {opened.base.config.get('model_type')!r:.40} nothing tells whether it is turned. {MERGE}."
        )
    return True


def _fits(shape: Sequence[int], b: TensorEntry, a: TensorEntry) -> bool:
    return len(a.shape) == len(b.shape) == 2 and (b.shape[0], a.shape[1], a.shape[0]) == (*shape, b.shape[1])


def _replaced(opened: _Opened) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Return what is stored in full (modules_to_save, trained biases) by canonical name, and its name in the file."""
    tensors: dict[str, TensorEntry] = {}
    keys: dict[str, str] = {}
    for key, entry in opened.stored.items():
        if _LORA.fullmatch(key):
            continue
        name = key.replace(".base_layer.", ".")
        like = opened.base.tensors.get(opened.embedding if name == HEAD and opened.embedding else name)
        shape = like.shape if like is not None else None
        if shape != entry.shape:
            has = f"has it with shape {list(shape)}" if shape is not None else "does not have"
            raise CheckpointMismatchError(
                f"{opened.directory}/{opened.weights_file} holds {name} with shape {list(entry.shape)}, and the base"
                f" {opened.base.directory} {has}. Give the base this run was started from, its vocabulary resized as"
                " the trainer does."
            )
        if not key.endswith(".base_layer.weight"):  # which is a copy of the base
            tensors[name] = replace(entry, name=name)
            keys[name] = key
    return tensors, keys


def _check_tied(opened: _Opened, adapted: Mapping[str, TensorEntry], head: TensorEntry | None) -> None:
    """Refuse an adapter that changes the embedding and leaves the head that the base ties to it, or the reverse."""
    if not opened.embedding:
        return
    module = opened.embedding.removesuffix(".weight")
    saved = opened.settings.modules_to_save or []
    trained = opened.embedding in adapted or any(module.endswith(name) for name in saved)
    if trained and head is None and not opened.settings.ensure_weight_tying:
        raise _tied(opened, module, HEAD)


def _tied(opened: _Opened, changed: str, left: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{opened.directory}: the adapter changes {changed} and leaves {left}, which the base {opened.base.directory}"
        " ties to it: no model with tied weights is that. Train with ensure_weight_tying, or from a base whose head is"
        " stored apart."
    )
