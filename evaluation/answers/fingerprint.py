"""Fingerprint: a model that may be loaded, named by the content of the files that affect its answers."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.digest import digest_file, digest_value
from evaluation.errors import ModelError

CONFIGURATION = ("config.json", "generation_config.json")
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
)
# The index of a model of 10^12 parameters has 20 MB.
_MOST_BYTES = 100_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@dataclass(frozen=True)
class LogitsExtrapolation:
    """Two model directories that answer as one, by next-token logits z_start + alpha (z_end - z_start).

    Between checkpoints of steps s_start and s_end, alpha = (s - s_start) / (s_end - s_start) stands for step s
    (arXiv 2601.04537). No directory holds such a model: it can be scored and compared, never registered.
    """

    start: Path
    end: Path
    alpha: float

    def __str__(self) -> str:
        return f"logits of {self.end} from {self.start} at alpha {self.alpha}"


@dataclass(frozen=True)
class Fingerprint:
    """Identity of a model: sha256 (hex) of its weights, configuration and tokenizer; the dtype it is stored in.

    Paths in `model` are absolute. For a pair the sha256 is of both digests and alpha.
    """

    model: Path | LogitsExtrapolation
    digest: str
    dtype: str | None


def fingerprint(model: Path | LogitsExtrapolation) -> Fingerprint:
    """Return the fingerprint of a Hugging Face model directory or a pair; files beside a model do not enter it.

    Refuses with ModelError what is no such directory, weights that are not safetensors or of which a shard is missing,
    models that bring their own code, and an alpha that is no finite number.
    """
    if isinstance(model, LogitsExtrapolation):
        return _fingerprint_pair(model)
    model = model.absolute()
    if not model.is_dir():
        raise ModelError(f"{model} is not a directory: pass a Hugging Face model directory.")
    _has(model, "config.json")
    config = _read_json(model / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if _has(model, name) and "auto_map" in _read_json(model / name):
            raise ModelError(
                f"{model / name} has auto_map, code of the model's own, which is never executed here: "
                "use an architecture that transformers ships."
            )
    if not any(_has(model, name) for name in TOKENIZER):
        raise ModelError(f"{model} has no tokenizer: copy the tokenizer files of the base model into it.")
    names = [*CONFIGURATION, *TOKENIZER, *_weight_names(model)]
    digests = {name: digest_file(model / name) for name in names if _has(model, name)}
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Fingerprint(model=model, digest=digest_value(digests), dtype=dtype)


def _fingerprint_pair(pair: LogitsExtrapolation) -> Fingerprint:
    if not math.isfinite(pair.alpha):
        raise ModelError(f"alpha is {pair.alpha} and must be a finite number: {pair.end} alone is 1.")
    start, end = fingerprint(pair.start), fingerprint(pair.end)
    # A float, since JSON tells 1 from 1.0.
    model = LogitsExtrapolation(pair.start.absolute(), pair.end.absolute(), float(pair.alpha))
    digest = digest_value({"start": start.digest, "end": end.digest, "alpha": model.alpha})
    # Two dtypes are none that models run in: evaluate refuses them with both names until it is given one.
    dtype = end.dtype if end.dtype == start.dtype else f"{end.dtype} and {start.dtype}"
    return Fingerprint(model=model, digest=digest, dtype=dtype)


def _weight_names(model: Path) -> list[str]:
    if _has(model, SINGLE):
        return [SINGLE]
    if not _has(model, INDEX):
        raise ModelError(f"{model} has neither {SINGLE} nor {INDEX}: only safetensors are loaded, convert the weights.")
    shards = sorted(set(_read_json(model / INDEX).get("weight_map", {}).values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ModelError(f"{model / INDEX} names {outside[0]}, which is no file of {model}: do not trust this model.")
    missing = [shard for shard in shards if not _has(model, shard)]
    if missing or not shards:
        raise ModelError(
            f"{model / INDEX} names {len(shards)} shards and {len(shards) - len(missing)} are present "
            f"(missing {', '.join(missing) or 'all'}): copy the model again."
        )
    return [INDEX, *shards]


def _has(model: Path, name: str) -> bool:
    """Whether the model has a regular file; ModelError for a link out of it and of the Hub cache it lies in."""
    path = model / name
    if not path.is_file():
        return False
    root, real = (Path(os.path.realpath(place)) for place in (model, path))
    caches = [parent.parent for parent in root.parents if parent.name == "snapshots"]
    blobs = [cache / "blobs" for cache in caches if cache.name.startswith("models--")]
    # Large files that several repositories have in common lie below the cache itself.
    shared = [cache.parent.parent / "blobs" for cache in blobs]
    if root in real.parents or real.parent in blobs or real.parent.parent in shared:
        return True
    raise ModelError(
        f"{path} is a link to {real}, outside of the model: copy the file, or pass the directory that holds it."
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if (size := path.stat().st_size) > _MOST_BYTES:
            raise ModelError(
                f"{path} has {size} bytes, and such a file has at most {_MOST_BYTES}: copy the model again."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read ({error}): this is no Hugging Face model directory.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__} and must hold an object.")
    return content
