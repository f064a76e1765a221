"""The base that an adapter names beside the one it is read on: on another of the same shape it is another model."""

import re
from collections.abc import Sequence
from pathlib import Path

from relex.errors import CheckpointError, UnreachableError
from relex.files.directory import Directory
from relex.files.local import LocalDirectory
from relex.layouts.factors import AdapterWeights
from relex.layouts.weights import Weights

# How the Hub's cache calls the directory of a model.
_CACHED = re.compile(r"models--(?:.*--)?(?P<name>.+)")
# Of each file of weights so much is compared, in its middle: training moves nearly every weight.
_SAMPLE_BYTES = 1 << 16


def foreign_base(checkpoints: Sequence[Weights]) -> str:
    """Return one line where the latest of them is an adapter that names another base than it is read on, else ""."""
    latest = checkpoints[-1] if checkpoints else None
    if not isinstance(latest, AdapterWeights):
        return ""
    named, base = latest.settings.get("base_model_name_or_path"), latest.base.directory
    if not isinstance(named, str) or not named or _is(named, base):
        return ""
    return (
        f"{latest.directory} is an adapter of {named} (base_model_name_or_path), and the base given is {base}: on a"
        " base that it was not trained on, every prediction is another model. Is it the same one?"
    )


def _is(named: str, base: Directory) -> bool:
    """Return whether the model of that path, or that name on the Hub, is the base, as far as can be told."""
    there = Path(named).expanduser()
    if there.is_dir() and isinstance(base, LocalDirectory):
        return there.resolve() == Path(str(base)).resolve() or _same_bytes(LocalDirectory(there), base)
    return bool(_names(named) & _names(str(base)))


def _names(location: str) -> set[str]:
    parts = [part for part in location.split("/") if part]
    cached = (match["name"] for part in parts if (match := _CACHED.fullmatch(part)))
    return {name.partition("@")[0].casefold() for name in (*parts[-1:], *cached)}


def _same_bytes(one: LocalDirectory, other: LocalDirectory) -> bool:
    try:
        files, others = one.files(), other.files()
        weights = {name for name in (*files, *others) if name.endswith((".safetensors", ".bin"))}
        return bool(weights) and all(
            name in files
            and name in others
            and files[name].size == others[name].size
            and _middle(one, name, files[name].size) == _middle(other, name, files[name].size)
            for name in weights
        )
    except (CheckpointError, UnreachableError, OSError):
        return False


def _middle(directory: LocalDirectory, name: str, size: int) -> bytes:
    start = max(0, size - _SAMPLE_BYTES) // 2
    return directory.read(name, start, start + _SAMPLE_BYTES)
