"""The safetensors weights of one model directory: which tensors, where their bytes lie, whether files changed.

Only headers are read here. `safetensors.safe_open` checks that a file is whole (it rejects every truncation and every
trailing byte); the offsets are then taken from the header so that any flat range of a tensor, whatever its shape, is
one `pread`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from relex.errors import CheckpointChangedError, CheckpointIncompleteError, CheckpointMismatchError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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


@dataclass(frozen=True)
class FileIdentity:
    """What a file was when its header was read: name, size in bytes, modification time in ns, inode."""

    name: str
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileIdentity":
        """Stat `path` (links followed); raises FileNotFoundError when there is none."""
        stat = path.stat()
        return cls(path.name, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor: its bytes are `file[offset : offset + nbytes]`, little-endian, row-major."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Weights:
    """The tensors of one model directory by canonical name, in file order, and the files that hold them.

    `alias` is the stored name of a tied output head that repeats the input embedding (None when there is none); it is
    not among `tensors`. That the two are equal has not been checked here, since it needs their bytes: see `trajectory`.
    """

    path: Path
    tensors: Mapping[str, TensorEntry]
    files: tuple[FileIdentity, ...]
    alias: TensorEntry | None
    config: Mapping[str, Any]

    @cached_property
    def identity(self) -> str:
        """Hex digest of which files these are (name, size, mtime, inode), without reading them."""
        return sha256(json.dumps([asdict(file) for file in self.files]).encode()).hexdigest()

    def read_into(self, entry: TensorEntry, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `entry` from byte `start` of the tensor; a file that got shorter raises."""
        path = self.path / entry.file
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointChangedError(
                f"{path} was there when the pass began and cannot be opened now ({error.strerror}). Does the trainer"
                " prune? Raise its number of kept checkpoints, then run again."
            ) from error
        try:
            position = entry.offset + start
            while buffer:
                count = os.preadv(descriptor, [buffer], position)
                if count == 0:
                    raise CheckpointChangedError(
                        f"{path} ended at byte {position} inside tensor {entry.name}: it was cut while being read."
                        " Wait until the trainer has finished with it, then run again."
                    )
                position += count
                buffer = buffer[count:]
        finally:
            os.close(descriptor)

    def check_unchanged(self) -> None:
        """Compare every file with what it was when its header was read; raises CheckpointChangedError with both."""
        for was in self.files:
            path = self.path / was.name
            try:
                now = FileIdentity.of(path)
            except FileNotFoundError:
                raise CheckpointChangedError(
                    f"{path} was removed while it was read. Raise the trainer's number of kept checkpoints, then run"
                    " again."
                ) from None
            if now != was:
                raise CheckpointChangedError(
                    f"{path} changed while it was read (size {was.size} → {now.size} bytes, mtime {was.mtime_ns} →"
                    f" {now.mtime_ns} ns, inode {was.inode} → {now.inode}). Was the run resumed? Run again when it is"
                    " quiet."
                )


def open_weights(path: Path, *, config: Mapping[str, Any] | None = None) -> Weights:
    """Read the headers of the weights in directory `path`, single file or sharded index.

    `config` stands in when the directory has no config.json (it says whether the output head is tied). Raises
    CheckpointIncompleteError when files are missing or not whole, CheckpointMismatchError when two files contradict.
    """
    own_config = _read_json(path / "config.json") if (path / "config.json").is_file() else None
    config = own_config if own_config is not None else (config or {})
    shards = _shards(path)
    files = []
    tensors: dict[str, TensorEntry] = {}
    for shard, expected in shards.items():
        identity = FileIdentity.of(path / shard)
        entries = _header(path / shard, identity)
        missing = sorted(expected - entries.keys()) if expected is not None else []
        if missing:
            raise CheckpointIncompleteError(
                f"{path / INDEX_FILE} places {missing[0]} in {shard}, which holds {len(entries)} tensors but not that"
                " one. If the trainer is still writing, wait; otherwise save the checkpoint again."
            )
        wanted = entries.keys() if expected is None else expected
        tensors |= {name: entry for name, entry in entries.items() if name in wanted}
        files.append(identity)
    canonical, alias = _without_alias(tensors, config)
    return Weights(path, canonical, tuple(files), alias, config)


def _shards(path: Path) -> dict[str, set[str] | None]:
    """Map each weight file to the tensor names the index places in it (None: all of a single file's)."""
    single, index = path / SINGLE_FILE, path / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointMismatchError(
            f"{path} has both {SINGLE_FILE} and {INDEX_FILE}: one of them is left over. Delete the one that is not"
            " meant."
        )
    if single.is_file():
        return {SINGLE_FILE: None}
    if not index.is_file():
        others = sorted(p.name for p in path.glob("*") if p.suffix in {".bin", ".pt", ".pth"})
        found = f" ({others[0]} is not read: save with safetensors)" if others else ""
        raise CheckpointIncompleteError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}. If the trainer is still writing, wait;"
            " otherwise point to the directory that holds the weights."
        )
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointIncompleteError(f"{index} has no weight_map. Save the checkpoint again.")
    shards: dict[str, set[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or shard.startswith("."):
            raise CheckpointMismatchError(
                f"{index} places {name} in {shard!r}, which is not a plain file name. A checkpoint may not point"
                " outside itself."
            )
        names = shards.setdefault(shard, set())
        assert names is not None
        names.add(name)
    missing = sorted(shard for shard in shards if not (path / shard).is_file())
    if missing:
        raise CheckpointIncompleteError(
            f"{path} is not complete: {INDEX_FILE} names {len(shards)} shards and {len(shards) - len(missing)} are"
            " present"
            f" (missing {missing[0]}). If the trainer is still writing, wait; if it died there, delete the directory."
        )
    return dict(sorted(shards.items()))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise CheckpointIncompleteError(
            f"{path} is not JSON ({error}). If the trainer is still writing, wait; otherwise save the checkpoint again."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointIncompleteError(f"{path} holds a JSON {type(content).__name__}, not an object.")
    return content


@lru_cache(maxsize=4096)  # a watcher looks at the same finished checkpoints every few seconds
def _header(path: Path, identity: FileIdentity) -> Mapping[str, TensorEntry]:
    """Return the tensors of one safetensors file in the order of their bytes."""
    try:
        with safe_open(path, framework="pt", backend="pread"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointIncompleteError(
            f"{path} ({identity.size} bytes) is not a whole safetensors file: {str(error).rstrip('.')}."
            " If the trainer is still writing, wait; if it died there, delete the directory."
        ) from error
    entries = []
    for name, item in header.items():
        if name == "__metadata__":
            continue
        if item["dtype"] not in DTYPES:
            raise CheckpointMismatchError(
                f"{path}: tensor {name} has dtype {item['dtype']}, which cannot be extrapolated;"
                f" known are {', '.join(DTYPES)}. Save the checkpoint in the trainer's own precision."
            )
        begin, end = item["data_offsets"]
        entries.append(
            TensorEntry(name, DTYPES[item["dtype"]], tuple(item["shape"]), path.name, 8 + length + begin, end - begin)
        )
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: (entry.offset, entry.name))}


def _without_alias(
    tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]
) -> tuple[Mapping[str, TensorEntry], TensorEntry | None]:
    """Drop a tied output head: transformers 5 silently unties a model whose file holds both names."""
    tied = config.get("tie_word_embeddings", (config.get("text_config") or {}).get("tie_word_embeddings", False))
    head = tensors.get("lm_head.weight")
    if not tied or head is None or embedding_name(tensors) is None:
        return dict(tensors), None
    return {name: entry for name, entry in tensors.items() if entry is not head}, head


def embedding_name(tensors: Mapping[str, TensorEntry]) -> str | None:
    """Return the name of the input embedding, None when there is not exactly one."""
    names = [name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight"))]
    return names[0] if len(names) == 1 else None
