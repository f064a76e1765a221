"""A base and the ordered checkpoints that agree with it, read as deltas, piece by piece.

The arithmetic is fixed by a grid that depends on nothing but the tensor: UNIT elements are one piece of work for one
thread, CHUNK elements are what is subtracted and multiplied at once. The memory budget decides only how many bytes one
`pread` brings. So equal input gives equal bits, whatever the budget and the number of threads.

Shape suffixes: K = checkpoints, N = elements of a chunk.
"""

import contextlib
import itertools
import math
import queue
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from relex.errors import CheckpointMismatchError, MemoryBudgetError, StoreError
from relex.layouts.weights import TensorEntry, Weights, embedding_name
from relex.store import Checkpoint, check_same_tensors

# Small enough that the deltas of 20 checkpoints stay near the core, large enough that a call's own cost does not show.
CHUNK = 1 << 15
UNIT = 1 << 20
# Larger reads gain nothing, and a budget is a bound, not a target.
MAX_READ_BYTES = 1 << 20

Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the model, as the base and as every checkpoint store it (one entry a checkpoint, in step order)."""

    base: TensorEntry
    entries: tuple[TensorEntry, ...]

    @property
    def name(self) -> str:
        """The canonical name."""
        return self.base.name

    @property
    def count(self) -> int:
        """Number of elements; 1 for a scalar."""
        return math.prod(self.base.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of every checkpoint's copy."""
        return self.entries[0].dtype

    @property
    def moves(self) -> bool:
        """Whether arithmetic is done on it: integers and booleans are copied."""
        return self.dtype.is_floating_point


@dataclass(frozen=True)
class Trajectory:
    """A base and at least two checkpoints at increasing steps whose tensors agree with it by name, shape and dtype."""

    base: Weights
    checkpoints: tuple[Checkpoint, ...]
    tensors: tuple[TensorSpec, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        """The training steps, increasing."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    def check_unchanged(self) -> None:
        """Compare every file with what it was when the trajectory was opened; raises CheckpointChangedError."""
        for weights in (self.base, *(checkpoint.weights for checkpoint in self.checkpoints)):
            weights.check_unchanged()


@dataclass(frozen=True)
class Unit:
    """Elements `start` to `stop` of tensor number `tensor`: one piece of work."""

    tensor: int
    start: int
    stop: int


def open_trajectory(base: Weights, checkpoints: Sequence[Checkpoint]) -> Trajectory:
    """Put a base and checkpoints together; refuses what does not agree, and a tied head unlike its embedding."""
    steps = [checkpoint.step for checkpoint in checkpoints]
    if len(steps) < 2 or any(later <= earlier for earlier, later in itertools.pairwise(steps)):
        raise StoreError(f"a trajectory needs at least 2 checkpoints at increasing steps, and these are at {steps}.")
    for weights in (base, *(checkpoint.weights for checkpoint in checkpoints)):
        check_same_tensors(weights, base)
        _check_tied_head(weights)
    tensors = []
    for name, entry in base.tensors.items():
        entries = tuple(checkpoint.weights.tensors[name] for checkpoint in checkpoints)
        for checkpoint, other in zip(checkpoints, entries, strict=True):
            if other.dtype is not entries[0].dtype:
                raise CheckpointMismatchError(
                    f"{checkpoint.weights.path}: {name} is {other.dtype}, at step {steps[0]} it is {entries[0].dtype}."
                    " One trajectory has one precision: leave out the checkpoints saved otherwise."
                )
        tensors.append(TensorSpec(entry, entries))
    return Trajectory(base, tuple(checkpoints), tuple(tensors))


def _check_tied_head(weights: Weights) -> None:
    """Refuse a config that says tied over a file whose head and embedding differ: transformers would untie them."""
    name = embedding_name(weights.tensors)
    if weights.alias is None or name is None:
        return
    embedding, head = weights.tensors[name], weights.alias
    same = (embedding.shape, embedding.dtype) == (head.shape, head.dtype)
    for start in range(0, head.nbytes if same else 0, MAX_READ_BYTES):
        size = min(MAX_READ_BYTES, head.nbytes - start)
        ours, theirs = bytearray(size), bytearray(size)
        weights.read_into(embedding, start, memoryview(ours))
        weights.read_into(head, start, memoryview(theirs))
        same = same and ours == theirs
    if not same:
        raise CheckpointMismatchError(
            f"{weights.path}: config.json says the output head is tied, and {head.name} differs from {name}."
            " Set tie_word_embeddings to false if the run trains both, or delete the stale head."
        )


def units(trajectory: Trajectory) -> list[Unit]:
    """Return the whole trajectory as pieces of work, in the order of the base's bytes."""
    return [
        Unit(index, start, min(start + UNIT, spec.count))
        for index, spec in enumerate(trajectory.tensors)
        for start in range(0, max(spec.count, 1), UNIT)
    ]


@dataclass(frozen=True)
class Block:
    """Part of one unit as it was read: elements `start` on, base (N,) and checkpoints (R, N) in their stored dtypes."""

    start: int
    base: Tensor
    stored: Tensor


@dataclass(frozen=True)
class Workspace:
    """The buffers of one thread: bytes of the base and of R checkpoints, `width` elements each; (R, CHUNK) deltas."""

    raw: Tensor
    deltas: Tensor
    width: int

    def blocks(self, trajectory: Trajectory, unit: Unit, rows: Sequence[int]) -> Iterator[Block]:
        """Read one unit of the base and of the checkpoints numbered `rows`; a block is overwritten by the next one."""
        spec = trajectory.tensors[unit.tensor]
        base_size, size = spec.base.dtype.itemsize, spec.dtype.itemsize
        for start in range(unit.start, unit.stop, self.width):
            count = min(self.width, unit.stop - start)
            base = self.raw[0, : count * base_size]
            stored = self.raw[1 : 1 + len(rows), : count * size]
            trajectory.base.read_into(spec.base, start * base_size, as_bytes(base))
            for row, target in zip(rows, stored, strict=True):
                weights = trajectory.checkpoints[row].weights
                weights.read_into(spec.entries[row], start * size, as_bytes(target))
            yield Block(start, base.view(spec.base.dtype), stored.view(spec.dtype))

    def subtract(self, block: Block) -> Iterator[tuple[slice, Tensor]]:
        """Yield, chunk by chunk, (the chunk's place in the block, deltas (R, n)), overwritten by the next.

        Deltas are fp32, or fp64 when either side is stored so.
        """
        fine, coarse = block.base.dtype, block.stored.dtype
        work = torch.float64 if torch.float64 in (fine, coarse) else torch.float32
        # A base kept finer than the checkpoints would put its own rounding error into every delta.
        round_base = torch.finfo(coarse).eps > torch.finfo(fine).eps
        for first in range(0, len(block.base), CHUNK):
            place = slice(first, min(first + CHUNK, len(block.base)))
            base = block.base[place].to(coarse) if round_base else block.base[place]
            deltas = self.deltas.view(work)[: len(block.stored), : place.stop - first]
            yield place, deltas.copy_(block.stored[:, place]).sub_(base.to(work))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous 1-D tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy().data)


def workspaces(trajectory: Trajectory, rows: int, *, memory: int, threads: int, extra: int = 0) -> list[Workspace]:
    """Allocate one workspace a thread within `memory` bytes, fewer threads if need be.

    `rows` is the number of checkpoints read at once, `extra` what the caller's own buffers take per thread. Raises
    MemoryBudgetError with the least budget that would do.
    """
    specs = trajectory.tensors
    wide = any(torch.float64 in (spec.base.dtype, spec.dtype) for spec in specs)
    item = max(max(spec.base.dtype.itemsize, spec.dtype.itemsize) for spec in specs)
    fixed = rows * CHUNK * (8 if wide else 4) + extra
    per_chunk = (1 + rows) * CHUNK * item
    least = fixed + per_chunk
    if memory < least:
        mib = 1 << 20
        raise MemoryBudgetError(
            f"--memory {memory // mib} MiB is below the {-(-least // mib)} MiB that one pass over {rows} checkpoints"
            f" needs. Give at least {-(-least // mib)}MiB."
        )
    threads = max(1, min(threads, memory // least))
    chunks = (memory // threads - fixed) // per_chunk
    chunks = max(1, min(chunks, MAX_READ_BYTES // (CHUNK * item), UNIT // CHUNK))
    width = chunks * CHUNK
    return [
        Workspace(
            raw=torch.empty(1 + rows, width * item, dtype=torch.uint8),
            deltas=torch.empty(rows, CHUNK, dtype=torch.float64 if wide else torch.float32),
            width=width,
        )
        for _ in range(threads)
    ]


def in_order(
    work: Callable[[Workspace, Unit], Result], pieces: Sequence[Unit], spaces: Sequence[Workspace]
) -> Iterator[tuple[Unit, Result]]:
    """Run `work` on every piece, one thread a workspace, and yield the results in the order of the pieces.

    The threads of torch and of BLAS are off meanwhile: on chunks of cache size they cost more than they bring.
    """
    free: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
    for space in spaces:
        free.put(space)

    def run(piece: Unit) -> Result:
        space = free.get()
        try:
            return work(space, piece)
        finally:
            free.put(space)

    pending: deque[tuple[Unit, Future[Result]]] = deque()
    with _single_threaded_libraries(), ThreadPoolExecutor(len(spaces), thread_name_prefix="relex") as pool:
        try:
            for piece in pieces:
                pending.append((piece, pool.submit(run, piece)))
                if len(pending) > 4 * len(spaces):
                    done, future = pending.popleft()
                    yield done, future.result()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _single_threaded_libraries() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
