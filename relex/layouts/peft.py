"""PEFT adapters: `adapter_model.safetensors` and `adapter_config.json`, LoRA in each form that leaves the base alone.

Trainer's and TRL's `checkpoint-N` of an adapter run, and verl's `global_step_N/actor/lora_adapter`.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory
from relex.formats.safetensors_header import StoredTensor, read_header
from relex.layouts.factors import AdapterWeights, Factor, LowRank, Unchanged
from relex.layouts.foreign import refuse_known
from relex.layouts.hf import descend, read_json
from relex.layouts.module_patterns import read_patterns
from relex.layouts.weights import TensorEntry, Weights, embedding_name, whole

NAME = "peft"

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PREFIX = "base_model.model."

_PLACES = ("", "actor/lora_adapter", "lora_adapter")
HEAD = "lm_head.weight"
_MERGE = "Let the trainer save merged models (peft's merge_and_unload)"

# What a configuration may say: what is read here, and what does not change the meaning of what is stored.
_READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "bias",
    "init_lora_weights", "ensure_weight_tying", "modules_to_save",
}  # fmt: skip
_NEUTRAL = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "layers_to_transform", "layers_pattern", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config",
}  # fmt: skip
# Where training starts from, without a change of the base: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA all make one.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
# Their linear layers are stored as (in, out), and of a square one the shape does not tell.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}

_LORA = re.compile(
    r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B|magnitude_vector)(\.default)?(\.weight)?"
)


@dataclass(frozen=True)
class _Opened:
    """One adapter directory while it is being read: its settings, its tensors by their names, and its base."""

    directory: Directory
    settings: Mapping[str, Any]
    stored: Mapping[str, StoredTensor]
    base: Weights

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
    settings = read_json(directory, CONFIG_FILE)
    _check_settings(directory, settings)
    header = read_header(directory, present[WEIGHTS_FILE]).tensors
    stored = {name.replace("_fsdp_wrapped_module.", "").removeprefix(PREFIX): entry for name, entry in header.items()}
    opened = _Opened(directory, settings, stored, base)
    tensors: dict[str, TensorEntry] = {
        name: Unchanged(name, entry.dtype, entry.shape, ()) for name, entry in base.tensors.items()
    }
    adapted = _adapted(opened)
    replaced, keys = _replaced(opened)
    alias = replaced.pop(HEAD, None) if opened.embedding else None
    _check_tied(opened, adapted, alias)
    tensors |= adapted | replaced
    files = (present[CONFIG_FILE], present[WEIGHTS_FILE])
    return AdapterWeights(NAME, directory, tensors, files, alias, base.config, base, settings, keys)


def _check_settings(directory: Directory, settings: Mapping[str, Any]) -> None:
    where = f"{directory}/{CONFIG_FILE}"
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointMismatchError(f"{where} has peft_type {kind!r}, and of adapters only LORA is read. {_MERGE}.")
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise CheckpointMismatchError(
            f"{where} has init_lora_weights {start!r}, which changes the base: the adapter belongs to one that is"
            " stored nowhere. Save it with peft's path_initial_model_for_weight_conversion, or train with"
            " init_lora_weights true."
        )
    for key in sorted(settings.keys() - _READ - _NEUTRAL):
        if settings[key]:
            raise CheckpointMismatchError(
                f"{where} sets {key} to {json.dumps(settings[key])}, which is not read. {_MERGE}, or train without it."
            )


def _adapted(opened: _Opened) -> dict[str, TensorEntry]:
    """Return what is stored as factors, by the name of the base's tensor."""
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in opened.stored.items():
        match = _LORA.fullmatch(name)
        if match is not None:
            part = whole(name, entry.dtype, entry.shape, WEIGHTS_FILE, entry.offset)
            modules.setdefault(match["module"], {})[match["part"]] = part
    tied = opened.settings.get("ensure_weight_tying")
    settings, where = opened.settings, f"{opened.directory}/{CONFIG_FILE}"
    ranks = read_patterns(settings, "rank_pattern", modules, otherwise=settings.get("r", 8), where=where)
    alphas = read_patterns(settings, "alpha_pattern", modules, otherwise=settings.get("lora_alpha", 8), where=where)
    return {
        # A tied head is given the embedding's own factors.
        f"{module}.weight": _low_rank(opened, module, parts, rank=ranks.of(module), alpha=alphas.of(module))
        for module, parts in modules.items()
        if not (tied and opened.embedding and f"{module}.weight" == HEAD)
    }


def _low_rank(opened: _Opened, module: str, parts: Mapping[str, TensorEntry], *, rank: float, alpha: float) -> LowRank:
    directory, settings, name = opened.directory, opened.settings, f"{module}.weight"
    needed = [side for side in ("A", "B", "embedding_A", "embedding_B") if side in parts]
    wanted = {"magnitude_vector"} if settings.get("use_dora") else set()
    if needed not in (["A", "B"], ["embedding_A", "embedding_B"]) or parts.keys() - set(needed) != wanted:
        raise CheckpointMismatchError(
            f"{directory}/{WEIGHTS_FILE} holds of {module} only {', '.join(f'lora_{part}' for part in sorted(parts))},"
            f" with use_dora {json.dumps(bool(wanted))}. Save the adapter again."
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
        straight = not (
            settings.get("fan_in_fan_out") or opened.base.config.get("model_type") in _CONV1D_MODELS
        ) or module.endswith("lm_head")
    length = shape[0 if straight else 1] if len(shape) == 2 else 0
    if not (straight or turned) or (magnitude is not None and magnitude.shape != (length,)):
        held = " and ".join(f"lora_{part} {list(entry.shape)}" for part, entry in sorted(parts.items()))
        raise CheckpointMismatchError(
            f"{directory}: {module} has {held}, and {name} of the base {opened.base.directory} has shape"
            f" {list(shape)}. Give the base this run was started from; with ZeRO-3 or FSDP, gather before saving."
        )
    if a.shape[0] != rank or rank == 0:
        raise CheckpointMismatchError(
            f"{directory}: {module} has rank {a.shape[0]} in {WEIGHTS_FILE} and {rank:g} in {CONFIG_FILE}. Save the"
            " adapter again."
        )
    scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
    left, right = (Factor(b, False), Factor(a, True)) if straight else (Factor(a, True), Factor(b, False))
    return LowRank(name, torch.float32, shape, (), left, right, scale, magnitude, embedding)


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
                f"{opened.directory}/{WEIGHTS_FILE} holds {name} with shape {list(entry.shape)}, and the base"
                f" {opened.base.directory} {has}. Give the base this run was started from, its vocabulary resized as"
                " the trainer does."
            )
        if not key.endswith(".base_layer.weight"):  # which is a copy of the base
            tensors[name] = whole(name, entry.dtype, entry.shape, WEIGHTS_FILE, entry.offset)
            keys[name] = key
    return tensors, keys


def _check_tied(opened: _Opened, adapted: Mapping[str, TensorEntry], head: TensorEntry | None) -> None:
    """Refuse an adapter that changes the embedding and leaves the head that the base ties to it, or the reverse."""
    if not opened.embedding:
        return
    module = opened.embedding.removesuffix(".weight")
    saved = opened.settings.get("modules_to_save") or []
    trained = opened.embedding in adapted or any(module.endswith(str(name)) for name in saved)
    if trained and head is None and not opened.settings.get("ensure_weight_tying"):
        raise _tied(opened, module, HEAD)


def _tied(opened: _Opened, changed: str, left: str) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        f"{opened.directory}: the adapter changes {changed} and leaves {left}, which the base {opened.base.directory}"
        " ties to it: no model with tied weights is that. Train with ensure_weight_tying, or from a base whose head is"
        " stored apart."
    )
