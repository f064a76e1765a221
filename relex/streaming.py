"""A trajectory read piece by piece, as deltas, by several threads, within a memory budget.

The arithmetic is fixed by a grid that depends on nothing but the tensor: UNIT elements are one piece of work for one
thread, CHUNK elements are what is subtracted and multiplied at once. The memory budget decides only how many bytes one
`pread` brings. So equal input gives equal bits, whatever the budget and the number of threads.

Shape suffixes: N = elements of a block, R = checkpoints read at once.
"""

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch import Tensor

from relex.errors import MemoryBudgetError
from relex.kernel import DTYPES, Rows, read
from relex.open_files import OpenFiles
from relex.trajectory import TensorSpec, Trajectory

# Small enough that the deltas of 20 checkpoints stay near the core, large enough that a call's own cost does not show.
CHUNK = 1 << 15
UNIT = 1 << 20
# Of more checkpoints than a few, larger reads leave the core's cache before they are used, and are slower from a disk.
MAX_READ_BYTES = 1 << 17

Result = TypeVar("Result")
Job = Callable[["Workspace"], None]
"""Something that is done by one thread with its buffers."""


@dataclass(frozen=True)
class Unit:
    """Elements `start` to `stop` of tensor number `tensor`: one piece of work."""

    tensor: int
    start: int
    stop: int


def units(trajectory: Trajectory) -> list[Unit]:
    """Return the whole trajectory as pieces of work, in the order of the base's bytes."""
    return [unit for index, spec in enumerate(trajectory.tensors) for unit in units_of(index, spec)]


def units_of(tensor: int, spec: TensorSpec) -> list[Unit]:
    """Return the pieces of tensor number `tensor`."""
    return [Unit(tensor, start, min(start + UNIT, spec.count)) for start in range(0, max(spec.count, 1), UNIT)]


@dataclass(frozen=True)
class Block:
    """Part of one unit as it was read: elements `start` on, base (N,) and checkpoints (R, N) in their stored dtypes.

    `relative` when what is stored is already what the checkpoints add to the base. `raw` are the bytes, the base first.
    """

    start: int
    base: Tensor
    stored: Tensor
    relative: bool
    raw: tuple[memoryview, ...]

    def subtracted(self, place: slice) -> Tensor:
        """Return what of the base is subtracted: kept finer it would put its own rounding error into every delta."""
        base, coarse = self.base[place], self.stored.dtype
        return base.to(coarse) if torch.finfo(coarse).eps > torch.finfo(base.dtype).eps else base


@dataclass(frozen=True)
class Workspace:
    """The buffers of one thread: bytes of the base and of R checkpoints, `width` elements each; (R, CHUNK) deltas."""

    raw: Tensor
    deltas: Tensor
    width: int
    files: OpenFiles

    def blocks(self, trajectory: Trajectory, unit: Unit, rows: Sequence[int]) -> Iterator[Block]:
        """Read one unit of the base and of the checkpoints numbered `rows`; a block is overwritten by the next one."""
        spec = trajectory.tensors[unit.tensor]
        entries = [spec.base, *(spec.entries[row] for row in rows)]
        weights = [trajectory.base, *(trajectory.checkpoints[row].weights for row in rows)]
        whole = as_bytes(self.raw.view(-1))
        stride = self.raw.shape[1]
        sizes = [entry.dtype.itemsize for entry in entries]
        places = [
            one.stretches(entry, unit.start * size, (unit.stop - unit.start) * size) or []
            for one, entry, size in zip(weights, entries, sizes, strict=True)
        ]
        # What lies in one stretch of one file is read for all rows at once; what is dealt out, row by row.
        single = [number for number, stretches in enumerate(places) if len(stretches) == 1]
        with self.files.using([(weights[number].directory, places[number][0][0]) for number in single]) as descriptors:
            opened = {number: one for number, one in zip(single, descriptors, strict=True) if one is not None}
            together = list(opened)
            alone = [number for number in range(len(entries)) if number not in opened]
            pieces_4P = np.array(
                [
                    [opened[number] for number in together],
                    [places[number][0][1] for number in together],
                    [number * stride for number in together],
                    [0 for _ in together],
                ],
                dtype=np.int64,
            )
            sizes_P = np.array([sizes[number] for number in together], dtype=np.int64)
            widest = min(self.width, unit.stop - unit.start)
            block = self._block(unit.start, widest, spec, sizes, whole)
            pieces_4P[3] = widest * sizes_P
            for start in range(unit.start, unit.stop, self.width):
                count = min(self.width, unit.stop - start)
                if count < widest:
                    block = self._block(start, count, spec, sizes, whole)
                    pieces_4P[3] = count * sizes_P
                # A file was cut, or does not answer: whoever reads it alone says which.
                for number in alone if read(pieces_4P, whole) else range(len(entries)):
                    weights[number].read_into(entries[number], start * sizes[number], block.raw[number])
                pieces_4P[1] += pieces_4P[3]
                yield Block(start, block.base, block.stored, block.relative, block.raw)

    def _block(self, start: int, count: int, spec: TensorSpec, sizes: Sequence[int], whole: memoryview) -> Block:
        """Return the block of `count` elements, `sizes` bytes each, that the buffer will hold."""
        stride = self.raw.shape[1]
        raw = tuple(whole[number * stride : number * stride + count * size] for number, size in enumerate(sizes))
        base = self.raw[0, : count * spec.base.dtype.itemsize]
        stored = self.raw[1 : len(sizes), : count * spec.dtype.itemsize]
        return Block(start, base.view(spec.base.dtype), stored.view(spec.dtype), spec.relative, raw)

    def subtract(self, block: Block) -> Iterator[tuple[slice, Tensor]]:
        """Yield, chunk by chunk, (the chunk's place in the block, deltas (R, n)), overwritten by the next.

        Deltas are fp32, or fp64 when either side is stored so.
        """
        work = torch.float64 if torch.float64 in (block.base.dtype, block.stored.dtype) else torch.float32
        for place in _chunks(block):
            deltas = self.deltas.view(work)[: len(block.stored), : place.stop - place.start]
            deltas.copy_(block.stored[:, place])
            if not block.relative:
                deltas.sub_(block.subtracted(place).to(work))
            yield place, deltas

    def rows(self, block: Block) -> Iterator[tuple[slice, Rows]]:
        """Yield a block as the loops in C take it, at once or, where it has to be converted, chunk by chunk."""
        if block.stored.dtype in DTYPES:
            everything = slice(0, len(block.base))
            base = None if block.relative else block.subtracted(everything).to(block.stored.dtype)
            yield everything, Rows(base, block.stored)
            return
        for place in _chunks(block):
            converted = self.deltas.view(torch.float32)[: len(block.stored), : place.stop - place.start]
            converted.copy_(block.stored[:, place])
            yield place, Rows(None if block.relative else block.subtracted(place).float(), converted)


def _chunks(block: Block) -> Iterator[slice]:
    for first in range(0, len(block.base), CHUNK):
        yield slice(first, min(first + CHUNK, len(block.base)))


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous 1-D tensor, without a copy."""
    return memoryview(tensor.view(torch.uint8).numpy().data)


def workspaces(
    trajectory: Trajectory, rows: int, *, memory: int, threads: int, extra: int = 0, held: int = 0
) -> list[Workspace]:
    """Allocate one workspace a thread within `memory` bytes, fewer threads if need be.

    `rows` is the number of checkpoints read at once, `extra` what the caller's own buffers take per thread, `held` what
    it keeps once. Raises MemoryBudgetError with the least budget that would do.
    """
    specs = trajectory.tensors
    wide = any(torch.float64 in (spec.base.dtype, spec.dtype) for spec in specs)
    itemsize = max(max(spec.base.dtype.itemsize, spec.dtype.itemsize) for spec in specs)
    fixed = rows * CHUNK * (8 if wide else 4) + extra
    per_chunk = (1 + rows) * CHUNK * itemsize
    # What reading an adapter takes is there once a checkpoint, whatever the number of threads.
    shared = held + sum(checkpoint.weights.scratch for checkpoint in trajectory.checkpoints)
    least = shared + fixed + per_chunk
    if memory < least:
        mib = 1 << 20
        raise MemoryBudgetError(
            f"--memory {memory // mib} MiB is below the {-(-least // mib)} MiB that one pass over {rows} checkpoints"
            f" needs. Give at least {-(-least // mib)}MiB."
        )
    memory -= shared
    threads = max(1, min(threads, memory // (fixed + per_chunk)))
    chunks = (memory // threads - fixed) // per_chunk
    chunks = max(1, min(chunks, MAX_READ_BYTES // (CHUNK * itemsize), UNIT // CHUNK))
    width = chunks * CHUNK
    files = OpenFiles()
    return [
        Workspace(
            raw=torch.empty(1 + rows, width * itemsize, dtype=torch.uint8),
            deltas=torch.empty(rows, CHUNK, dtype=torch.float64 if wide else torch.float32),
            width=width,
            files=files,
        )
        for _ in range(threads)
    ]


def in_order(
    work: Callable[[Workspace, Unit], Result],
    pieces: Sequence[Unit],
    spaces: Sequence[Workspace],
    *,
    urgent: deque[Job] | None = None,
) -> Generator[tuple[Unit, Result], None, None]:
    """Run `work` on every piece, one thread a workspace, and yield the results in the order of the pieces.

    What whoever takes a result puts into `urgent` is done before the pieces that wait, and all of it before this ends.
    The threads of torch and of BLAS are off meanwhile: on chunks of cache size they cost more than they bring.
    """
    free: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
    for space in spaces:
        free.put(space)
    sooner: queue.SimpleQueue[Job] = queue.SimpleQueue()
    later: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def run() -> None:
        space = free.get()
        try:
            try:
                job = sooner.get_nowait()
            except queue.Empty:
                job = later.get_nowait()
            job(space)
        finally:
            free.put(space)

    pending: deque[tuple[Unit, Future[Result]]] = deque()
    aside: list[Future[None]] = []
    with single_threaded(), ThreadPoolExecutor(len(spaces), thread_name_prefix="relex") as pool:

        def submit(piece: Unit) -> None:
            future: Future[Result] = Future()
            later.put(partial(_settle, future, lambda space: work(space, piece)))
            pool.submit(run)
            pending.append((piece, future))

        def hurry() -> None:
            while urgent:
                ended: Future[None] = Future()
                sooner.put(partial(_settle, ended, urgent.popleft()))
                pool.submit(run)
                aside.append(ended)

        try:
            for piece in pieces:
                submit(piece)
                if len(pending) > 4 * len(spaces):
                    done, future = pending.popleft()
                    yield done, future.result()
                    hurry()
            while pending:
                done, future = pending.popleft()
                yield done, future.result()
                hurry()
            for ended in aside:
                ended.result()
        finally:
            pool.shutdown(cancel_futures=True)
            for space in spaces:
                space.files.close()


def _settle(future: Future[Result], job: Callable[[Workspace], Result], space: Workspace) -> None:
    try:
        future.set_result(job(space))
    except BaseException as error:  # noqa: BLE001
        future.set_exception(error)


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Turn the threads of torch and of BLAS off: on small work they cost more than they bring."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
