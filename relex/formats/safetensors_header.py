"""The header of one safetensors file: which tensors, and where their bytes lie.

Checked as strictly as the library does (every truncation and every trailing byte is refused), on any kind of directory.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity

FLOAT_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# No arithmetic is done on these: they are copied.
EXACT_DTYPES = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = FLOAT_DTYPES | EXACT_DTYPES
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# The library's own limit.
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the file: its bytes are `file[offset : offset + nbytes]`, little-endian, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Header:
    """The tensors of one file in the order of their bytes, and the strings its writer put beside them."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


@lru_cache(maxsize=4096)  # a watcher looks at the same finished checkpoints every few seconds
def read_header(directory: Directory, file: FileIdentity) -> Header:
    """Read the header of one file; raises CheckpointIncompleteError when the file is not whole."""
    try:
        return _parse(directory, file)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointIncompleteError(
            f"{directory}/{file.name} ({file.size} bytes) is not a whole safetensors file: {str(error).rstrip('.')}."
            " If the trainer is still writing, wait; if it died there, delete the directory."
        ) from error


def _parse(directory: Directory, file: FileIdentity) -> Header:
    length = int.from_bytes(directory.read(file.name, 0, 8), "little")
    if file.size < 8 or length > min(file.size - 8, _MOST_HEADER_BYTES):
        raise ValueError(f"its header is said to have {length} bytes")
    content = json.loads(directory.read(file.name, 8, 8 + length))
    if not isinstance(content, dict):
        raise ValueError(f"its header holds a JSON {type(content).__name__}, not an object")  # noqa: TRY004
    metadata = content.pop("__metadata__", {})
    entries = sorted(
        (_entry(name, described, where=f"{directory}/{file.name}") for name, described in content.items()),
        key=lambda entry: entry[1:],
    )
    position = 0
    tensors = {}
    for (name, dtype, shape), begin, end in entries:
        if begin != position or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"tensor {name} of shape {list(shape)} lies at bytes {begin} to {end}, after {position}")
        position = end
        tensors[name] = StoredTensor(name, dtype, shape, 8 + length + begin)
    if 8 + length + position != file.size:
        raise ValueError(f"its tensors end at byte {8 + length + position}")
    return Header(tensors, metadata if isinstance(metadata, dict) else {})


def _entry(name: str, described: Any, *, where: str) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], int, int]:
    if not isinstance(described, dict) or not described.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name} has no dtype, shape and place")
    if not isinstance(described["dtype"], str):
        raise ValueError(f"tensor {name} has a dtype that is a JSON {type(described['dtype']).__name__}")  # noqa: TRY004
    if described["dtype"] not in DTYPES:
        raise CheckpointMismatchError(
            f"{where}: tensor {name} has dtype {described['dtype']}, which cannot be extrapolated;"
            f" known are {', '.join(DTYPES)}. Save the checkpoint in the trainer's own precision."
        )
    shape, offsets = described["shape"], described["data_offsets"]
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name} has shape {shape} and place {offsets}")
    return (name, DTYPES[described["dtype"]], tuple(shape)), offsets[0], offsets[1]


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
