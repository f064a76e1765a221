"""Fingerprint: a model that may be loaded, named by the content of the files that affect its answers."""

import json
import math
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
    config = _read_json(model / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (model / name).is_file() and "auto_map" in _read_json(model / name):
            raise ModelError(
                f"{model / name} has auto_map, code of the model's own, which is never executed here: "
                "use an architecture that transformers ships."
            )
    if not any((model / name).is_file() for name in TOKENIZER):
        raise ModelError(f"{model} has no tokenizer: copy the tokenizer files of the base model into it.")
    names = [*CONFIGURATION, *TOKENIZER, *_weight_names(model)]
    digests = {name: digest_file(model / name) for name in names if (model / name).is_file()}
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
    if (model / SINGLE).is_file():
        return [SINGLE]
    if not (model / INDEX).is_file():
        raise ModelError(f"{model} has neither {SINGLE} nor {INDEX}: only safetensors are loaded, convert the weights.")
    shards = sorted(set(_read_json(model / INDEX).get("weight_map", {}).values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise ModelError(f"{model / INDEX} names {outside[0]}, which is no file of {model}: do not trust this model.")
    missing = [shard for shard in shards if not (model / shard).is_file()]
    if missing or not shards:
        raise ModelError(
            f"{model / INDEX} names {len(shards)} shards and {len(shards) - len(missing)} are present "
            f"(missing {', '.join(missing) or 'all'}): copy the model again."
        )
    return [INDEX, *shards]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}): this is no Hugging Face model directory.") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds a {type(content).__name__} and must hold an object.")
    return content
