"""The weights of one checkpoint: which tensors, in which pieces their bytes lie, whether files changed.

A layout says where the pieces are; any flat range of a tensor, whatever its shape and however it is sharded, is then
a few reads.
"""

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch

from relex.errors import CheckpointChangedError, CheckpointMismatchError
from relex.files.directory import Directory, FileIdentity

# transformers' Conv1D, by model and by the last part of the layer's name.
_CONV1D_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: elements `origin` to `origin + shape`, row-major from byte `offset` of `file`."""

    file: str
    offset: int
    origin: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as stored; its pieces are little-endian and tile it exactly."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Weights:
    """The tensors of one checkpoint by canonical name, in file order, and the files that hold them.

    `alias` is the stored name of a tied output head that repeats the input embedding (None when there is none); it is
    not among `tensors`. That the two are equal has not been checked here, since it needs their bytes: see `trajectory`.
    """

    layout: str
    directory: Directory
    tensors: Mapping[str, TensorEntry]
    files: tuple[FileIdentity, ...]
    alias: TensorEntry | None
    config: Mapping[str, Any]

    @cached_property
    def identity(self) -> str:
        """Hex digest of which files these are (name, size, mtime, version), without reading them."""
        named = [(file.name, file.size, file.mtime_ns, file.version) for file in self.files]
        keys = ("name", "size", "mtime_ns", "version")
        return sha256(json.dumps([dict(zip(keys, one, strict=True)) for one in named]).encode()).hexdigest()

    @property
    def changes(self) -> tuple[tuple[int, int], ...]:
        """When each file last changed in any way, in ns, and how many links it has: no part of what it is called."""
        return tuple((file.changed_ns, file.links) for file in self.files)

    @property
    def scratch(self) -> int:
        """Bytes of memory that reading takes beyond the buffer it fills."""
        return 0

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `entry` from byte `start` of the tensor; a file that got shorter raises."""
        for piece in entry.pieces:
            for place, position, length in _runs(entry, piece, start, start + len(buffer)):
                self._read(entry, piece.file, position, buffer[place - start : place - start + length])

    def stretches(self, entry: TensorEntry, start: int, length: int) -> list[tuple[str, int, int, int]] | None:
        """Return where `length` bytes of `entry` from byte `start` on lie: (file, byte of it, byte of them, how many).

        None for what is not stored as it is read.
        """
        if type(entry) is not TensorEntry:
            return None
        if len(entry.pieces) == 1:
            (piece,) = entry.pieces
            return [(piece.file, piece.offset + start, 0, length)]
        return [
            (piece.file, position, place - start, size)
            for piece in entry.pieces
            for place, position, size in _runs(entry, piece, start, start + length)
        ]

    def ends(self, entry: TensorEntry) -> list[int]:
        """Return after which elements of a tensor one of its files ends: there a write that was cut left zeros.

        Empty for what lies in one piece: there it is the tensor's own end.
        """
        if len(entry.pieces) == 1:
            return []
        strides = [math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape))]
        return [
            1 + sum((begin + n - 1) * s for begin, n, s in zip(piece.origin, piece.shape, strides, strict=True))
            for piece in entry.pieces
            if (size := math.prod(piece.shape) * entry.dtype.itemsize)
            and piece.offset + size == self._sizes.get(piece.file)
        ]

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {file.name: file.size for file in self.files}

    def _read(self, entry: TensorEntry, file: str, position: int, buffer: memoryview) -> None:
        try:
            count = self.directory.read_into(file, position, buffer)
        except OSError as error:
            raise CheckpointChangedError(
                f"{self.directory}/{file} was there when the pass began and cannot be opened now ({error.strerror})."
                " Does the trainer prune? Raise its number of kept checkpoints, then run again."
            ) from error
        if count < len(buffer):
            raise CheckpointChangedError(
                f"{self.directory}/{file} ended at byte {position + count} inside tensor {entry.name}: it was cut while"
                " being read. Wait until the trainer has finished with it, then run again."
            )

    def check_unchanged(self) -> None:
        """Compare every file with what it was when its header was read; raises CheckpointChangedError with both."""
        for was in self.files:
            path = f"{self.directory}/{was.name}"
            try:
                now = self.directory.identity(was.name)
            except FileNotFoundError:
                raise CheckpointChangedError(
                    f"{path} was removed while it was read. Raise the trainer's number of kept checkpoints, then run"
                    " again."
                ) from None
            except OSError as error:
                raise CheckpointChangedError(
                    f"{path} was replaced while it was read ({error.strerror}). Let it be read, or save the checkpoint"
                    " again."
                ) from error
            if not now.is_still(was):
                raise CheckpointChangedError(
                    f"{path} changed while it was read (size {was.size} → {now.size} bytes, mtime {was.mtime_ns} →"
                    f" {now.mtime_ns} ns, version {was.version} → {now.version}, changed {was.changed_ns} →"
                    f" {now.changed_ns} ns). Was the run resumed? Run again when it is quiet."
                )


def whole(name: str, dtype: torch.dtype, shape: tuple[int, ...], file: str, offset: int) -> TensorEntry:
    """Return the entry of a tensor that lies in one piece."""
    return TensorEntry(name, dtype, shape, (Piece(file, offset, (0,) * len(shape), shape),))


def tiled(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Sequence[Piece], *, where: Directory
) -> TensorEntry:
    """Return the entry of a tensor that lies in several pieces; raises CheckpointMismatchError unless they tile it."""
    ordered = tuple(sorted(pieces, key=lambda piece: piece.origin))
    outside = [
        piece
        for piece in ordered
        if len(piece.origin) != len(shape)
        or any(
            first < 0 or count < 0 or first + count > size
            for first, count, size in zip(piece.origin, piece.shape, shape, strict=False)
        )
    ]
    held = sum(math.prod(piece.shape) for piece in ordered)
    if outside or held != math.prod(shape) or _overlap(ordered):
        raise CheckpointMismatchError(
            f"{where}: the {len(ordered)} pieces of {name} hold {held} elements, and its shape {list(shape)} has"
            f" {math.prod(shape)}. A rank's files are missing or left over: save the checkpoint again."
        )
    return TensorEntry(name, dtype, shape, ordered)


def is_turned(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a layer's matrix is stored as (in, out): Conv1D is, of a square one the shape does not tell."""
    layer = name.removesuffix(".weight").rpartition(".")[2]
    return knows_turned(config) and layer in _CONV1D_LAYERS


def knows_turned(config: Mapping[str, Any]) -> bool:
    """Whether the names of a model's layers tell which are Conv1D."""
    return config.get("model_type") in _CONV1D_MODELS


def make_weights(
    layout: str,
    directory: Directory,
    tensors: Mapping[str, TensorEntry],
    files: Sequence[FileIdentity],
    config: Mapping[str, Any],
) -> Weights:
    """Put the weights of one checkpoint together, a tied output head apart."""
    embedding = embedding_name(tensors)
    head = tensors.get("lm_head.weight")
    # Files of multimodal models keep it with the text model's settings.
    text = config.get("text_config")
    tied = config.get("tie_word_embeddings", text.get("tie_word_embeddings") if isinstance(text, dict) else False)
    alias = head if tied and embedding is not None else None
    kept = {name: entry for name, entry in tensors.items() if entry is not alias}
    return Weights(layout, directory, kept, tuple(files), alias, config)


def embedding_name(tensors: Mapping[str, TensorEntry]) -> str | None:
    """Return the name of the input embedding, None when there is not exactly one."""
    names = [name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    return names[0] if len(names) == 1 else None


def _overlap(pieces: Sequence[Piece]) -> bool:
    """Whether two of the pieces, which are in the order of their origins, have an element in common."""
    # Of empty pieces there is one for each rank beyond the rows.
    filled = [piece for piece in pieces if math.prod(piece.shape)]
    for index, one in enumerate(filled):
        for other in itertools.islice(filled, index + 1, None):
            # Of hundreds of ranks only neighbours need to be compared.
            if other.origin and other.origin[0] >= one.origin[0] + one.shape[0]:
                break
            if all(
                max(a, b) < min(a + m, b + n)
                for a, m, b, n in zip(one.origin, one.shape, other.origin, other.shape, strict=True)
            ):
                return True
    return False


def _runs(entry: TensorEntry, piece: Piece, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Yield what of `piece` lies in bytes `start` to `stop` of the tensor, run by run.

    A run is (its byte in the tensor, its byte in the file, its length).
    """
    size = entry.dtype.itemsize
    strides = [math.prod(entry.shape[axis + 1 :]) for axis in range(len(entry.shape))]
    # Up to this axis the box is narrower than the tensor: along it and what is inside it, bytes are contiguous.
    axis = max((i for i in range(len(entry.shape)) if piece.shape[i] != entry.shape[i]), default=0)
    length = math.prod(piece.shape[axis:]) * size
    if length == 0:
        return
    ranges = [range(count) for count in piece.shape[:axis]]
    if ranges:
        row = strides[0] * size
        first = max(0, start // row - piece.origin[0])
        ranges[0] = range(first, min(piece.shape[0], -(-stop // row) - piece.origin[0]))
    steps = [math.prod(piece.shape[i + 1 : axis]) for i in range(axis)]
    for index in itertools.product(*ranges):
        inner = (0,) * (len(entry.shape) - axis)
        place = size * sum(
            (first + i) * stride for first, i, stride in zip(piece.origin, (*index, *inner), strides, strict=True)
        )
        number = sum(i * step for i, step in zip(index, steps, strict=True))
        begin, end = max(place, start), min(place + length, stop)
        if begin < end:
            yield begin, piece.offset + number * length + begin - place, end - begin
