"""torch.distributed.checkpoint: `.metadata` says where in the `.distcp` files the boxes of each tensor lie.

prime-rl and NeMo-RL write it, and Trainer and accelerate with FSDP's sharded state dict. `.metadata` is a pickle, which
is read and not executed, and is written last; each box is a small torch file somewhere in a larger one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import torch

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity
from relex.formats.pickled import Global, Made, brief, load, shown
from relex.formats.safetensors_header import DTYPES
from relex.formats.torch_file import LocalTensor, read_torch_file, require_contiguous
from relex.layouts.foreign import megatron_files
from relex.layouts.hf import descend
from relex.layouts.weights import Piece, TensorEntry, Weights, make_weights, tiled

NAME = "dcp"

METADATA = ".metadata"
_DATA = ".distcp"
# The step directory itself; prime-rl; NeMo-RL, its first DTensor backend and its second; Trainer and accelerate.
_PLACES = ("", "trainer", "policy/weights", "policy/weights/model", "pytorch_model_fsdp_0")
# What the model's names come after: in prime-rl; in NeMo-RL and accelerate; in a model saved by itself.
_PREFIXES = ("app.model.", "model.", "")
# What may stand beside a model saved by itself.
_OTHERS = ("optim", "lr_scheduler", "dataloader", "train_state")
_MODULE = "torch.distributed.checkpoint"
_DTYPES = {str(dtype): dtype for dtype in DTYPES.values()}


@dataclass(frozen=True)
class _Box:
    """A box of a tensor, and the bytes `start` to `stop` of the file that hold it as a torch file of its own."""

    file: str
    start: int
    stop: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Stored:
    """One tensor as `.metadata` has it; `dtype` is torch's name for it."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[_Box, ...]


def find(step: Directory) -> Directory | None:
    """Return the directory in the step directory that holds such files, None when there is none."""
    for place in _PLACES:
        directory = descend(step, place)
        names = directory.files() if directory is not None else {}
        if any(name == METADATA or name.endswith(_DATA) for name in names) and not megatron_files(names):
            return directory
    return None


def open_weights(directory: Directory, *, base: Weights) -> Weights:
    """Read `.metadata` and the head of every box of the model; what else is stored is left alone.

    Raises CheckpointIncompleteError when files are missing or not whole, CheckpointMismatchError when they contradict
    each other, or when nothing in them has the base's names.
    """
    present = directory.files()
    if METADATA not in present:
        raise CheckpointIncompleteError(
            f"{directory} has no {METADATA}, which is written last. If the trainer is still writing, wait; if it died"
            " there, delete the directory."
        )
    data = tuple(file for name, file in present.items() if name.endswith(_DATA))
    tensors = _read(directory, present[METADATA], data, tuple(base.tensors))
    used = sorted({piece.file for entry in tensors.values() for piece in entry.pieces})
    return make_weights(NAME, directory, tensors, [present[name] for name in (*used, METADATA)], base.config)


@lru_cache(maxsize=64)  # a watcher looks at the same finished checkpoints every few seconds
def _read(
    directory: Directory, metadata: FileIdentity, data: tuple[FileIdentity, ...], names: tuple[str, ...]
) -> Mapping[str, TensorEntry]:
    """Return the entries of the model whose tensors the base calls `names`."""
    where = f"{directory}/{metadata.name}"
    content = load(directory.read(metadata.name), where=where)
    try:
        model, sizes = _parse(content, names)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointMismatchError(
            f"{where} is not what torch.distributed.checkpoint writes for this model: {shown(str(error))}. Save the"
            " checkpoint again with torch's FileSystemWriter and Hugging Face names, or export it as safetensors."
        ) from error
    present = {file.name: file for file in data}
    for name in sorted({box.file for stored in model.values() for box in stored.boxes}):
        size = present[name].size if name in present else None
        if size != sizes[name]:
            raise CheckpointIncompleteError(
                f"{directory} is not complete: {METADATA} places weights in {shown(name)} of {sizes[name]} bytes, which"
                f" {'is missing' if size is None else f'has {size}'}. If the trainer is still writing, wait; otherwise"
                " save the checkpoint again."
            )
    return {name: _entry(name, stored, directory, present) for name, stored in model.items()}


def _entry(name: str, stored: _Stored, directory: Directory, present: Mapping[str, FileIdentity]) -> TensorEntry:
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        raise CheckpointMismatchError(
            f"{directory}: tensor {name} has dtype {shown(stored.dtype)}, which cannot be extrapolated; known are"
            f" {', '.join(_DTYPES)}. Save the checkpoint in the trainer's own precision."
        )
    pieces = tuple(_piece(name, dtype, box, directory, present[box.file]) for box in stored.boxes)
    return tiled(name, dtype, stored.shape, pieces, where=directory)


def _piece(name: str, dtype: torch.dtype, box: _Box, directory: Directory, file: FileIdentity) -> Piece:
    held = read_torch_file(directory, file, start=box.start, stop=box.stop)
    if not isinstance(held, LocalTensor) or (held.dtype, held.shape) != (dtype, box.shape):
        what = f"{held.dtype} {list(held.shape)}" if isinstance(held, LocalTensor) else f"a {type(held).__name__}"
        raise CheckpointMismatchError(
            f"{directory}: {METADATA} places {dtype} {list(box.shape)} of {name} at byte {box.start} of {file.name},"
            f" which holds {what} there: they are of two checkpoints. Save it again."
        )
    require_contiguous(held, name, where=f"{directory}/{file.name}")
    return Piece(file.name, held.offset, box.origin, box.shape)


def _parse(content: Any, names: Collection[str]) -> tuple[dict[str, _Stored], dict[str, int]]:
    """Return the model's tensors by their own names, and the size of each file: where the last thing in it ends."""
    top = _fields(content, "metadata.Metadata")
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    sizes: dict[str, int] = {}
    for key, info in top["storage_data"].items():
        index, place = _fields(key, "metadata.MetadataIndex"), _fields(info, "filesystem._StorageInfo")
        name, file = _text(index["fqn"]), _text(place["relative_path"])
        if place.get("transform_descriptors"):
            raise ValueError(f"{name} is stored as {brief(place['transform_descriptors'])}, which is not read")
        start, length = _counts((place["offset"], place["length"]))
        if PurePosixPath(file).name != file or file.startswith("."):
            raise ValueError(f"{name} is placed in {file}, which is not a plain file name")
        places[name, _counts(index.get("offset") or ())] = file, start, start + length
        sizes[file] = max(sizes.get(file, 0), start + length)
    tensors = {
        name: _fields(stored, "metadata.TensorStorageMetadata")
        for name, stored in ((_text(key), stored) for key, stored in top["state_dict_metadata"].items())
        if stored.name != f"{_MODULE}.metadata.BytesStorageMetadata"
    }
    return {own: _stored(name, tensors[name], places) for own, name in _model(tensors, names).items()}, sizes


def _model(tensors: Collection[str], names: Collection[str]) -> dict[str, str]:
    """Map the model's own names to those that are stored."""
    known = [sum(prefix + name in tensors for name in names) for prefix in _PREFIXES]
    if not any(known):
        raise ValueError(
            f"none of its {len(tensors)} tensors ({min(tensors, default='')}, …) is called as one of the base's"
            f" ({min(names, default='')}, …)"
        )
    prefix = _PREFIXES[known.index(max(known))]
    return {
        name.removeprefix(prefix): name
        for name in tensors
        if name.startswith(prefix) and (prefix or not name.startswith(_OTHERS))
    }


def _stored(
    name: str, fields: Mapping[str, Any], places: Mapping[tuple[str, tuple[int, ...]], tuple[str, int, int]]
) -> _Stored:
    dtype = _fields(fields["properties"], "metadata.TensorProperties")[0]
    if not isinstance(dtype, Global):
        raise TypeError(f"the dtype of {name} is a {type(dtype).__name__}")
    boxes = []
    for chunk in fields["chunks"]:
        box = _fields(chunk, "metadata.ChunkStorageMetadata")
        origin, shape = _counts(box["offsets"]), _counts(box["sizes"])
        boxes.append(_Box(*places[name, origin], origin, shape))
    return _Stored(dtype.name, _counts(fields["size"]), tuple(boxes))


def _fields(made: Any, kind: str) -> Any:
    """Return the state of a record of one of DCP's own classes."""
    if not isinstance(made, Made) or made.name != f"{_MODULE}.{kind}":
        raise TypeError(f"a {made.name if isinstance(made, Made) else type(made).__name__} stands for a {kind}")
    return made.state


def _counts(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{brief(values)} are not sizes")
    return values


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} stands for a name")
    return value
