"""A model directory that is complete or absent.

Shards are filled by position in a hidden sibling of the output; a shard gets its name when it is whole and on disk, so
a killed process goes on where it stopped; the directory gets its name last.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from relex.errors import OutputError
from relex.files.directory import Directory
from relex.files.whole import room_for
from relex.formats.safetensors_header import DTYPE_NAMES
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE
from relex.layouts.peft import WEIGHTS_FILE as ADAPTER_FILE
from relex.layouts.side_files import side_names
from relex.layouts.weights import Weights
from relex.output.manifest import FILE_NAME, FileRecord, read

# The order in which safetensors itself lays tensors out: by dtype, then by name.
_DTYPE_ORDER = ("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "I8", "U8", "BOOL")

# In the place of the prediction's name.
_EARLY = "early"


@dataclass(frozen=True)
class OutputTensor:
    """One tensor to be written: its name, dtype, shape, size in bytes and the shard it goes to."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    nbytes: int
    shard: str


@dataclass
class _Shard:
    path: Path
    descriptor: int
    offsets: Mapping[str, int]


@dataclass
class ModelWriter:
    """Writes one model directory; use `open_writer`, and `join_writer` in processes that write shards of it."""

    out: Path
    partial: Path
    tensors: Mapping[str, OutputTensor]
    _lock: int
    _made_parent: bool
    _suffix: str = ".tmp"
    _open: dict[str, _Shard] = field(default_factory=dict)
    # Whole shards are read for their records while others are written.
    _records: dict[str, Future[FileRecord]] = field(default_factory=dict)
    _recorder: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "relex-record"))

    def pending(self, name: str) -> bool:
        """Whether the shard of tensor `name` still has to be written."""
        return not (self.partial / self.tensors[name].shard).exists()

    @property
    def missing(self) -> list[str]:
        """The shards that still have to be written."""
        shards = sorted({tensor.shard for tensor in self.tensors.values()})
        return [shard for shard in shards if not (self.partial / shard).exists()]

    def announce(self, side_files: Mapping[str, bytes], manifest: Any) -> None:
        """Put down what other processes need to write shards; `publish` replaces it."""
        with self._room():
            for name, content in side_files.items():
                _write_durably(self.partial / name, content)
            _write_durably(self.partial / FILE_NAME, _json(manifest))

    def begin(self, name: str) -> None:
        """Make room for the shard of tensor `name`, unless it is open already."""
        shard = self.tensors[name].shard
        if shard in self._open:
            return
        inside = [tensor for tensor in self.tensors.values() if tensor.shard == shard]
        header, offsets, size = _header(inside)
        path = self.partial / f"{shard}{self._suffix}"
        with self._room():
            descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC, 0o666)
            self._open[shard] = _Shard(path, descriptor, offsets)
            _write_at(descriptor, memoryview(header), 0)
            os.truncate(descriptor, len(header) + size)

    def write(self, name: str, start: int, data: memoryview) -> None:
        """Put `data` at byte `start` of tensor `name`; any thread, any order."""
        shard = self._open[self.tensors[name].shard]
        with self._room():
            _write_at(shard.descriptor, data, shard.offsets[name] + start)

    def close(self, shard: str) -> None:
        """Every tensor of `shard` is written: make it durable, give it its name and have its record made meanwhile."""
        done = self._open.pop(shard)
        try:
            with self._room():
                os.fsync(done.descriptor)
        finally:
            os.close(done.descriptor)
        done.path.replace(self.partial / shard)
        # Who joins does not publish.
        if self._lock >= 0:
            self._records[shard] = self._recorder.submit(FileRecord.of, self.partial / shard)

    def publish(self, side_files: Mapping[str, bytes], manifest: Callable[[Mapping[str, FileRecord]], Any]) -> None:
        """Add the other files and the manifest made from all files' records, then let the directory appear."""
        files = dict(side_files)
        shards = sorted({tensor.shard for tensor in self.tensors.values()})
        if shards not in ([SINGLE_FILE], [ADAPTER_FILE]):
            total = sum(tensor.nbytes for tensor in self.tensors.values())
            weight_map = {name: self.tensors[name].shard for name in sorted(self.tensors)}
            files[INDEX_FILE] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
        # Of processes that were killed while they wrote a shard.
        _remove_unfinished(self.partial)
        with self._room():
            for name, content in files.items():
                _write_durably(self.partial / name, content)
            records = {name: self._record(name) for name in sorted({*files, *shards})}
            _write_durably(self.partial / FILE_NAME, _json(manifest(records)))
        os.fsync(self._lock)
        try:
            self.partial.rename(self.out)
        except OSError as error:
            raise OutputError(
                f"{self.out} appeared while it was being written ({error.strerror}). Delete one of the two."
            ) from error
        parent = os.open(self.out.parent, os.O_RDONLY)
        os.fsync(parent)
        os.close(parent)
        self.release()

    def remove(self, name: str) -> None:
        """Take back the shard of tensor `name`: it is missing again."""
        shard = self.tensors[name].shard
        if (record := self._records.pop(shard, None)) is not None:
            wait([record])
        (self.partial / shard).unlink(missing_ok=True)

    def take_name(self, digest: str) -> bool:
        """Become, of an early output, that of the prediction named `digest`; False where there is another one of it."""
        partial = _partial(self.out, digest, self.tensors.values())
        if self.out.exists() or partial.exists():
            return False
        # They are read by the name that the directory has now.
        wait(self._records.values())
        self.partial.rename(partial)
        self.partial = partial
        return True

    def _record(self, name: str) -> FileRecord:
        known = self._records.pop(name, None)
        return FileRecord.of(self.partial / name) if known is None else known.result()

    def _room(self) -> contextlib.AbstractContextManager[None]:
        return room_for(self._size, self.out, partial=self.partial)

    @cached_property
    def _size(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def discard(self) -> None:
        """Remove what was written so far."""
        self._stop_recording()
        shutil.rmtree(self.partial, ignore_errors=True)
        if self._made_parent:
            with contextlib.suppress(OSError):  # another output is there by now
                self.out.parent.rmdir()
        self.release()

    def release(self) -> None:
        """Let go of the lock and of open shards; what is whole stays for the next attempt."""
        self._stop_recording()
        for shard in self._open.values():
            os.close(shard.descriptor)
        self._open.clear()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _stop_recording(self) -> None:
        self._recorder.shutdown(cancel_futures=True)
        self._records.clear()


def open_writer(out: Path, digest: str, tensors: Sequence[OutputTensor]) -> ModelWriter | None:
    """Start, or take up again, the output `out` of the prediction named `digest`.

    None: it is there already, finished. Raises OutputError when something else is, or another process is writing it.
    """
    if out.exists() or out.is_symlink():
        present = read(out).digest if (out / FILE_NAME).is_file() else None
        if present == digest:
            return None
        what = f"the prediction {present[:12]}…, not {digest[:12]}…" if present else "something relex did not write"
        raise OutputError(f"output {out} exists and holds {what}. Delete it, or give another --out.")
    return _open(out, _partial(out, digest, tensors), tensors)


def open_early(out: Path, tensors: Sequence[OutputTensor]) -> ModelWriter | None:
    """Start the output `out` of a prediction that has no name yet; no other call goes on with it.

    None: something of that output is there. Raises OutputError when another process is writing it.
    """
    partial = _early(out)
    if out.exists() or out.is_symlink() or set(out.parent.glob(f".{out.name}.*.partial")) - {partial}:
        return None
    writer = _open(out, partial, tensors)
    for leftover in partial.iterdir():
        leftover.unlink()
    return writer


def _written_elsewhere(out: Path) -> OutputError:
    return OutputError(f"output {out} is being written by another process. Wait for it, or give another --out.")


def _early(out: Path) -> Path:
    return out.parent / f".{out.name}.{_EARLY}.partial"


def _partial(out: Path, digest: str, tensors: Iterable[OutputTensor]) -> Path:
    # Shards of another cut may have the same names and hold other tensors.
    cut = json.dumps([digest, {tensor.name: tensor.shard for tensor in tensors}], sort_keys=True)
    return out.parent / f".{out.name}.{sha256(cut.encode()).hexdigest()[:16]}.partial"


def _open(out: Path, partial: Path, tensors: Sequence[OutputTensor]) -> ModelWriter:
    made_parent = not out.parent.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"output {out} cannot be made: {error.strerror} at {error.filename}. Give another --out."
        ) from error
    early = _early(out)
    for leftover in out.parent.glob(f".{out.name}.*.partial"):
        # What another prediction of this name left behind when it was killed; a live one holds its lock.
        if leftover != partial and (lock := try_lock(leftover)) is not None:
            shutil.rmtree(leftover)
            os.close(lock)
        elif leftover == early and leftover != partial:
            raise _written_elsewhere(out)
    partial.mkdir(exist_ok=True)
    lock = try_lock(partial)
    if lock is None:
        raise _written_elsewhere(out)
    _remove_unfinished(partial)
    return ModelWriter(out, partial, {tensor.name: tensor for tensor in tensors}, lock, made_parent)


def join_writer(partial: Path, tensors: Sequence[OutputTensor]) -> ModelWriter:
    """Return a writer of shards in `partial`, which another process opened and will publish.

    What it has begun has a name of its own: a process that was taken for dead and is not may finish the same shard,
    with the same bytes.
    """
    suffix = f".{socket.gethostname()}-{os.getpid()}.tmp"
    return ModelWriter(partial, partial, {tensor.name: tensor for tensor in tensors}, -1, False, suffix)


def side_files(base: Weights, latest: Weights) -> dict[str, bytes]:
    """Return config, tokenizer and generation files by name: the base's, and what only the latest checkpoint has."""
    owners: dict[str, Directory] = {}
    for directory in (latest.directory, base.directory):
        owners |= dict.fromkeys(side_names(directory), directory)
    return {name: directory.read(name) for name, directory in sorted(owners.items())}


def try_lock(directory: Path) -> int | None:
    """Lock the directory itself and return the lock, None when another process has it.

    It goes with its process, moves with a rename and leaves no file.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _header(tensors: Sequence[OutputTensor]) -> tuple[bytes, dict[str, int], int]:
    """Return the safetensors header, the offset of each tensor in the file, and the bytes that follow the header."""
    ordered = sorted(tensors, key=lambda tensor: (_DTYPE_ORDER.index(DTYPE_NAMES[tensor.dtype]), tensor.name))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    begins = {}
    for tensor in ordered:
        begins[tensor.name] = begin
        offsets = [begin, begin + tensor.nbytes]
        table[tensor.name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": tensor.shape, "data_offsets": offsets}
        begin += tensor.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {name: start + offset for name, offset in begins.items()}, begin


def _remove_unfinished(partial: Path) -> None:
    for file in partial.glob("*.tmp"):
        file.unlink()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, position)
        position += count
        data = data[count:]


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
