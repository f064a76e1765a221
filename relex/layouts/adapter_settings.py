"""What `adapter_config.json` says of an adapter: values of the types that peft writes, and no setting unknown here."""

import json
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from relex.errors import CheckpointMismatchError
from relex.formats.pickled import brief, shown
from relex.layouts.module_patterns import ModulePatterns, compile_bounded, read_patterns

# Where training starts from, without a change of the base: PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA all make one.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
MERGE = "Let the trainer save merged models (peft's merge_and_unload)"
_MOST = 10**9
_LAYER = re.compile(r".*?\.[^.]*\.(?P<layer>[0-9]{1,9})\.")

Number = Annotated[float, Field(ge=0, le=_MOST, allow_inf_nan=False)]
# A module, or the end of its name.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
Names = list[Name]


class AdapterSettings(BaseModel):
    """The settings of a LoRA adapter as peft reads them; those below `revision` do not change what is stored."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    r: int = Field(8, ge=1, le=_MOST)
    lora_alpha: Number = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=_MOST)]] = {}
    alpha_pattern: dict[str, Number] = {}
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    ensure_weight_tying: bool = False
    target_modules: Names | str
    exclude_modules: Names | str | None = None
    modules_to_save: Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | Name | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None

    task_type: Annotated[str, Field(pattern="^[A-Z0-9_]+$")] | None = None
    auto_mapping: dict[str, JsonValue] | None = None
    peft_version: str | None = None
    inference_mode: bool = False
    lora_dropout: Annotated[float, Field(ge=0, le=1)] = 0.0
    megatron_core: str | None = None
    loftq_config: dict[str, JsonValue] | None = None
    eva_config: dict[str, JsonValue] | None = None
    corda_config: dict[str, JsonValue] | None = None
    lora_ga_config: dict[str, JsonValue] | None = None
    qalora_group_size: int = 16

    def targets(self, modules: Collection[str], *, where: str) -> set[str]:
        """Return which modules peft gives factors; raises CheckpointMismatchError for a pattern that is of no use."""
        excluded = _matching(self.exclude_modules or [], "exclude_modules", modules, where)
        saved = [re.compile(rf"(^|.*\.){name}($|\..*)") for name in self.modules_to_save or ()]
        excluded |= {module for module in modules if any(one.match(module) for one in saved)}
        matched = _matching(self.target_modules, "target_modules", modules, where)
        named = set() if isinstance(self.target_modules, str) else {*self.target_modules}
        return {module for module in matched - excluded if module in named or self._transforms(module)}

    def ranks(self, modules: Collection[str], *, where: str) -> ModulePatterns:
        """Return the rank of each module's factors."""
        return read_patterns(self.rank_pattern, "rank_pattern", modules, otherwise=self.r, where=where)

    def alphas(self, modules: Collection[str], *, where: str) -> ModulePatterns:
        """Return the alpha of each module."""
        return read_patterns(self.alpha_pattern, "alpha_pattern", modules, otherwise=self.lora_alpha, where=where)

    def _transforms(self, module: str) -> bool:
        """Whether the module is of one of the layers that are meant, when there are such."""
        chosen = self.layers_to_transform
        if chosen is None or chosen == []:
            return True
        given = self.layers_pattern or []
        named = [
            re.compile(rf"(?:^|.*?\.){one}\.(?P<layer>[0-9]{{1,9}})\.")
            for one in ([given] if isinstance(given, str) else given)
        ]
        matches = (pattern.match(module) for pattern in named or [_LAYER])
        layer = next((int(match["layer"]) for match in matches if match is not None), None)
        return layer in (chosen if isinstance(chosen, list) else [chosen])


def read_settings(content: Mapping[str, Any], *, where: str) -> AdapterSettings:
    """Return what an adapter_config.json says; raises CheckpointMismatchError for what peft would not write there.

    That is a value of another type, and a setting that is not known here unless it is off.
    """
    kind = content.get("peft_type")
    if kind != "LORA":
        raise CheckpointMismatchError(
            f"{where} has peft_type {brief(kind)}, and of adapters only LORA is read. {MERGE}."
        )
    start = content.get("init_lora_weights", True)
    if type(start) not in (bool, str) or start not in _STARTS:
        raise CheckpointMismatchError(
            f"{where} has init_lora_weights {brief(start)}, which changes the base: the adapter belongs to one that is"
            " stored nowhere. Save it with peft's path_initial_model_for_weight_conversion, or train with"
            " init_lora_weights true."
        )
    # What only the memory of the trainer holds, and verl writes all the same.
    rest = {
        key: value for key, value in content.items() if key not in ("peft_type", "init_lora_weights", "runtime_config")
    }
    try:
        settings = AdapterSettings.model_validate(rest)
    except ValidationError as error:
        raise CheckpointMismatchError(_said(error, rest, where)) from error
    for key, value in sorted((settings.model_extra or {}).items()):
        # An empty object is a configuration with the defaults.
        if value not in (None, False, []):
            raise CheckpointMismatchError(
                f"{where} sets {shown(key)} to {shown(json.dumps(value))}, which is not read. {MERGE}, or train without"
                " it."
            )
    return settings


def _said(error: ValidationError, content: Mapping[str, Any], where: str) -> str:
    key = str(error.errors()[0]["loc"][0])
    # Of a value that may be of several types there is a complaint for each.
    said = dict.fromkeys(one["msg"] for one in error.errors(include_url=False) if one["loc"][0] == key)
    if key not in content:
        return f"{where} has no {key}. Save the adapter again."
    return f"{where}: {key} is {brief(content[key])} ({shown('; '.join(said))}). Save the adapter again."


def _matching(given: Names | str, key: str, modules: Collection[str], where: str) -> set[str]:
    """Return the modules whose whole name fits a pattern, or whose name ends in one of several."""
    if isinstance(given, str):
        pattern, _ = compile_bounded(given, given, modules, key=key, where=where)
        return {module for module in modules if pattern.fullmatch(module)}
    names = set(given)
    return {module for module in modules if any(ending in names for ending in _endings(module))}


def _endings(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[place:]) for place in range(len(parts))]
