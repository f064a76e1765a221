"""What `torch.save` wrote into a file, or into a range of one: the object tree, each tensor as a place in the file.

The file is a zip archive of a pickle and of the bytes of every storage, not compressed. Only its directory, the pickle
and the header of each storage are read.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from relex.errors import CheckpointIncompleteError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity
from relex.formats.archive import Archive, Record, open_archive
from relex.formats.pickled import Builder, Global, Made, load, shown
from relex.formats.safetensors_header import DTYPE_NAMES

_DTYPES = {str(dtype): dtype for dtype in DTYPE_NAMES}
_STORAGES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
}
# Its size is in bytes; the tensor says the dtype.
_UNTYPED = "torch.storage.UntypedStorage"
_MOST_ARGUMENTS = 64


@dataclass(frozen=True)
class LocalTensor:
    """A tensor in a file: its first element is at byte `offset` of the file; `stride` counts elements."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def contiguous(self) -> bool:
        """Whether its elements follow each other in row-major order."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return math.prod(self.shape) == 0
            expected *= size
        return True


@dataclass(frozen=True)
class _Storage:
    """Bytes `start` to `start + size` of the file; the dtype where the storage has one."""

    dtype: torch.dtype | None
    start: int
    size: int


def read_torch_file(
    directory: Directory,
    file: FileIdentity,
    *,
    start: int = 0,
    stop: int | None = None,
    unknown: Literal["refuse", "stub"] = "refuse",
) -> Any:
    """Return what was saved in bytes `start` to `stop` of a file (None: to its end), its tensors as `LocalTensor`.

    The rest is as `pickled.load` returns it, which says what `unknown` does. Raises CheckpointIncompleteError when the
    archive is not whole, CheckpointMismatchError when it holds what is not read here.
    """
    stop = file.size if stop is None else stop
    where = f"{directory}/{file.name}" + (f" (bytes {start} to {stop})" if stop - start != file.size else "")
    try:
        return _read(_open(directory, file, start, stop), where, unknown)
    except (OSError, ValueError) as error:
        raise CheckpointIncompleteError(
            f"{where} is not a whole file of torch.save: {shown(str(error).rstrip('.'))}. If the trainer is still"
            " writing, wait; otherwise save the checkpoint again."
        ) from error


def require_contiguous(tensor: LocalTensor, name: str, *, where: str) -> LocalTensor:
    """Return the tensor; raises CheckpointMismatchError with its name when its elements do not lie in order."""
    if not tensor.contiguous:
        raise CheckpointMismatchError(
            f"{where}: tensor {shown(name)} of shape {list(tensor.shape)} was saved with strides"
            f" {list(tensor.stride)}, not row by row. Save it contiguous, or export the checkpoint as safetensors."
        )
    return tensor


def _open(directory: Directory, file: FileIdentity, start: int, stop: int) -> Archive:
    if not 0 <= start < stop <= file.size:
        raise ValueError(f"the file has {file.size} bytes")
    return open_archive(directory, file.name, start=start, stop=stop)


def _read(archive: Archive, where: str, unknown: Literal["refuse", "stub"]) -> Any:
    names = [name for name in archive.records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} records data.pkl")
    root = names[0].removesuffix("data.pkl")
    order = f"{root}byteorder"
    # Versions of torch that do not write it do not write big-endian either.
    if order in archive.records and archive.content(order) != b"little":
        raise CheckpointMismatchError(f"{where} is not from a little-endian machine. Export it there as safetensors.")
    storages = {
        name.removeprefix(f"{root}data/"): record
        for name, record in archive.records.items()
        if name.startswith(f"{root}data/")
    }
    return load(
        archive.content(names[0]),
        where=where,
        builders=_builders(where),
        persistent_load=_storage_of(storages, where),
        unknown=unknown,
    )


def _storage_of(records: Mapping[str, Record], where: str) -> Callable[[Any], _Storage]:
    def storage(identifier: Any) -> _Storage:
        """Find the bytes of ("storage", type, key, location, number of elements)."""
        kind, storage_type, key, _, count = identifier
        # The count is multiplied and shown: it must be a number.
        if kind != "storage" or not isinstance(storage_type, Global) or type(key) is not str or type(count) is not int:
            raise ValueError("it refers to something that is no storage")
        dtype = _STORAGES.get(storage_type.name)
        if dtype is None and storage_type.name != _UNTYPED:
            raise CheckpointMismatchError(
                f"{where} holds a {shown(storage_type.name)}, which cannot be extrapolated. Save the checkpoint in the"
                " trainer's own precision."
            )
        record = records[key]
        if record.size != count * (1 if dtype is None else dtype.itemsize):
            raise ValueError(f"storage {key} of {count} elements has {record.size} bytes")
        return _Storage(dtype, record.start, record.size)

    return storage


def _builders(where: str) -> dict[str, Builder]:
    def tensor(storage: Any, first: Any, shape: Any, stride: Any, *_: Any) -> LocalTensor:
        return _tensor(storage, storage.dtype, first, shape, stride)

    # The first arguments are the same; the dtype of an untyped storage is behind them.
    def tensor_of_dtype(*arguments: Any) -> LocalTensor:
        storage, first, shape, stride, _, _, dtype = arguments[:7]
        if dtype.name not in _DTYPES:
            raise CheckpointMismatchError(
                f"{where} holds a tensor of {shown(dtype.name)}, which cannot be extrapolated; known are"
                f" {', '.join(DTYPE_NAMES.values())}. Save the checkpoint in the trainer's own precision."
            )
        return _tensor(storage, _DTYPES[dtype.name], first, shape, stride)

    def parameter(data: Any, *_: Any) -> Any:
        return data

    builders: dict[str, Builder] = {
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": tensor_of_dtype,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_parameter_with_state": parameter,
    }

    def with_attributes(function: Any, kind: Any, arguments: Any, state: Any) -> Any:
        """Return the tensor of one that carries attributes; one of a class of its own stays a record of the class."""
        if not isinstance(kind, Global) or not isinstance(arguments, tuple) or len(arguments) > _MOST_ARGUMENTS:
            raise ValueError("a tensor has no class and arguments")
        builder = builders.get(function.name)
        return Made(kind, arguments, state) if builder is None else builder(*arguments)

    return builders | {"torch._tensor._rebuild_from_type_v2": with_attributes}


def _tensor(storage: Any, dtype: Any, first: Any, shape: Any, stride: Any) -> LocalTensor:
    if (
        not isinstance(shape, tuple)
        or not isinstance(stride, tuple)
        or not len(shape) == len(stride) <= _MOST_ARGUMENTS
    ):
        raise ValueError("a tensor has no shape and strides")
    numbers = (first, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("a tensor has no storage, place, shape and strides")
    last = first + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if math.prod(shape) and (last + 1) * dtype.itemsize > storage.size:
        raise ValueError(f"a tensor of shape {list(shape)} ends behind its storage of {storage.size} bytes")
    return LocalTensor(dtype, shape, stride, storage.start + first * dtype.itemsize)
