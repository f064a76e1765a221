"""Hugging Face weights: `model.safetensors`, or shards and their index.

Besides Trainer's and TRL's `checkpoint-N` this is what a bf16 merge, an export for inference and a base model are.
"""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory
from relex.formats.safetensors_header import read_header
from relex.layouts.foreign import refuse_known
from relex.layouts.weights import TensorEntry, Weights, make_weights, whole

NAME = "hf"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Where a trainer keeps a whole model inside its step directory; verl writes the last two when it is asked to.
_PLACES = ("", "actor/huggingface", "actor/model/huggingface")


def find(step: Directory) -> Directory | None:
    """Return the directory in the step directory that holds such weights, None when there is none."""
    for place in _PLACES:
        directory = descend(step, place)
        if directory is not None and directory.files().keys() & {SINGLE_FILE, INDEX_FILE}:
            return directory
    return None


def descend(directory: Directory, place: str) -> Directory | None:
    """Return the directory `place` ("a/b", "" for itself) in `directory`, None when it is not there."""
    for name in filter(None, place.split("/")):
        if name not in directory.children():
            return None
        directory = directory.enter(name)
    return directory


def open_weights(directory: Directory, *, base: Weights) -> Weights:
    """Open the weights of a checkpoint; what its own config.json does not say, the base's does."""
    return open_model(directory, config=base.config)


def open_model(directory: Directory, *, config: Mapping[str, Any]) -> Weights:
    """Read the headers of the weights in `directory`, single file or sharded index.

    `config` stands in when there is no config.json (it says whether the output head is tied). Raises
    CheckpointIncompleteError when files are missing or not whole, CheckpointMismatchError when two files contradict.
    """
    present = directory.files()
    files = []
    tensors: dict[str, TensorEntry] = {}
    if "config.json" in present:
        config = read_json(directory, "config.json")
    for shard, expected in _shards(directory).items():
        stored = read_header(directory, present[shard]).tensors
        missing = sorted(expected - stored.keys()) if expected is not None else []
        if missing:
            raise CheckpointIncompleteError(
                f"{directory}/{INDEX_FILE} places {missing[0]} in {shard}, which holds {len(stored)} tensors but not"
                " that one. If the trainer is still writing, wait; otherwise save the checkpoint again."
            )
        for name, entry in stored.items():
            if expected is None or name in expected:
                tensors[name] = whole(name, entry.dtype, entry.shape, shard, entry.offset)
        files.append(present[shard])
    return make_weights(NAME, directory, tensors, files, config)


def read_json(directory: Directory, name: str) -> dict[str, Any]:
    """Read a JSON object; raises CheckpointIncompleteError when it is none, as while it is being written."""
    try:
        content = json.loads(directory.read(name))
    except (ValueError, RecursionError) as error:
        raise CheckpointIncompleteError(
            f"{directory}/{name} is not JSON ({error}). If the trainer is still writing, wait; otherwise save the"
            " checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointIncompleteError(f"{directory}/{name} holds a JSON {type(content).__name__}, not an object.")
    return content


def _shards(directory: Directory) -> dict[str, set[str] | None]:
    """Map each weight file to the tensor names the index places in it (None: all of a single file's)."""
    present = directory.files()
    if SINGLE_FILE in present and INDEX_FILE in present:
        raise CheckpointMismatchError(
            f"{directory} has both {SINGLE_FILE} and {INDEX_FILE}: one of them is left over. Delete the one that is not"
            " meant."
        )
    if SINGLE_FILE in present:
        return {SINGLE_FILE: None}
    if INDEX_FILE not in present:
        refuse_known(directory)
        raise CheckpointIncompleteError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}. If the trainer is still writing, wait; otherwise"
            " point to the directory that holds the weights."
        )
    weight_map = read_json(directory, INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointIncompleteError(f"{directory}/{INDEX_FILE} has no weight_map. Save the checkpoint again.")
    shards: dict[str, set[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or PurePosixPath(shard).name != shard or shard.startswith("."):
            raise CheckpointMismatchError(
                f"{directory}/{INDEX_FILE} places {name} in {shard!r}, which is not a plain file name. A checkpoint may"
                " not point outside itself."
            )
        names = shards.setdefault(shard, set())
        assert names is not None
        names.add(name)
    missing = sorted(shards.keys() - present.keys())
    if missing:
        raise CheckpointIncompleteError(
            f"{directory} is not complete: {INDEX_FILE} names {len(shards)} shards and {len(shards) - len(missing)} are"
            f" present (missing {missing[0]}). If the trainer is still writing, wait; if it died there, delete the"
            " directory."
        )
    return dict(sorted(shards.items()))
