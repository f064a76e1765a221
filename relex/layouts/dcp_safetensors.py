"""Sharded safetensors: what torch.distributed.checkpoint writes for Hugging Face names, and with it NeMo-RL.

Every rank writes its boxes into files of its own, with the place of each box in the header. How large a whole tensor is
no file says, so without the files of a rank a tensor would just be smaller: its shape is taken from the base.
"""

import json
import re
from collections import defaultdict
from typing import Any

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity
from relex.formats.safetensors_header import Header, StoredTensor, read_header
from relex.layouts.hf import descend
from relex.layouts.weights import Piece, TensorEntry, Weights, make_weights, tiled

NAME = "dcp_safetensors"

_SHARD = re.compile(r"shard-\d+-model-\d+-of-\d+\.safetensors")
_PLACES = ("", "policy/weights/model")  # the second is NeMo-RL's


def find(step: Directory) -> Directory | None:
    """Return the directory in the step directory that holds such shards, None when there is none."""
    for place in _PLACES:
        directory = descend(step, place)
        if directory is not None and any(map(_SHARD.fullmatch, directory.files())):
            return directory
    return None


def open_weights(directory: Directory, *, base: Weights) -> Weights:
    """Read the headers of all shards and put the boxes together to tensors of the base's shapes.

    Raises CheckpointIncompleteError when a file is not whole or a part of a tensor is in none of them,
    CheckpointMismatchError when the boxes contradict each other.
    """
    files = [file for name, file in directory.files().items() if _SHARD.fullmatch(name)]
    boxes: dict[str, list[tuple[StoredTensor, Piece]]] = defaultdict(list)
    for file in files:
        header = read_header(directory, file)
        for name, origin in _origins(header, file, directory).items():
            stored = header.tensors[name]
            boxes[name].append((stored, Piece(file.name, stored.offset, origin, stored.shape)))
    missing = sorted(base.tensors.keys() - boxes.keys())
    if missing:
        raise CheckpointIncompleteError(
            f"{directory}: none of the {len(files)} shards holds {missing[0]}, which the base {base.directory} has with"
            f" shape {list(base.tensors[missing[0]].shape)}. The files of the rank that held it are missing: wait, or"
            " save the checkpoint again. If they are all there, give the base this run was started from."
        )
    tensors = {name: _entry(name, parts, directory, base) for name, parts in boxes.items()}
    return make_weights(NAME, directory, tensors, files, base.config)


def _entry(name: str, boxes: list[tuple[StoredTensor, Piece]], directory: Directory, base: Weights) -> TensorEntry:
    first, _ = boxes[0]
    for stored, piece in boxes:
        if stored.dtype is not first.dtype or len(stored.shape) != len(first.shape):
            raise CheckpointMismatchError(
                f"{directory}: {name} is {stored.dtype} of {len(stored.shape)} dimensions in {piece.file} and"
                f" {first.dtype} of {len(first.shape)} in {boxes[0][1].file}: one of the two is left over from another"
                " run. Delete it, or save the checkpoint again."
            )
    reach = tuple(max(piece.origin[axis] + piece.shape[axis] for _, piece in boxes) for axis in range(len(first.shape)))
    known = base.tensors.get(name, base.alias if base.alias is not None and base.alias.name == name else None)
    shape = reach if known is None else known.shape
    if reach != shape:
        raise CheckpointIncompleteError(
            f"{directory}: the shards present hold {name} up to {list(reach)}, the base {base.directory} has"
            f" {list(shape)}. The files of a rank are missing: wait, or save the checkpoint again. If they are all"
            " there, give the base this run was started from."
        )
    return tiled(name, first.dtype, shape, [piece for _, piece in boxes], where=directory)


def _origins(header: Header, file: FileIdentity, directory: Directory) -> dict[str, tuple[int, ...]]:
    """Return where in its whole tensor each box of one file begins."""
    try:
        said = json.loads(header.metadata["DCP_SHARDING_INFO"])
        return {name: _origin(said[name]["saved_offsets"], tensor) for name, tensor in header.tensors.items()}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointMismatchError(
            f"{directory}/{file.name} does not say where in the whole tensors its parts lie (DCP_SHARDING_INFO:"
            f" {error!r}). Save with torch's HuggingFaceStorageWriter, or as one model."
        ) from error


def _origin(said: Any, tensor: StoredTensor) -> tuple[int, ...]:
    if not isinstance(said, list) or len(said) != len(tensor.shape) or any(type(value) is not int for value in said):
        raise ValueError(f"{tensor.name} of shape {list(tensor.shape)} begins at {said}")
    return tuple(said)
