"""Blocks of remote files on this machine's disk, for as long as they are being read.

A Gram needs every pair of checkpoints, so no step can be folded in and dropped by itself. A range of bytes can: that
of all K steps is fetched, folded into the Gram and dropped, unless it still fits, since a second pass combines the same
bytes. So what was fetched first is kept until the cache is full, and from then on room is made by dropping what was
read last: to drop the oldest, as caches do, would drop each block of a scan just before the next pass asks for it. What
did not fit is fetched again.

Reading is by pieces of a row each, and a network wants large requests and several at once: a miss fetches a whole
block, and the next ones of the same file with it. A block that finds no room is not fetched at all, only the bytes that
were asked for. The disk holds at most `size` bytes, memory the blocks on their way: FETCHES of BLOCK bytes.

The file has no name, so a killed process leaves nothing behind, and two processes have nothing to share.
"""

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

BLOCK = 8 << 20
FETCHES = 8
# With few files, one block ahead of each would not keep as many requests under way.
AHEAD = 2

DEFAULT_BYTES = 8 << 30

Fetch = Callable[[int, int], bytes]
"""Brings bytes start to stop of one file over the network; fewer where it ends before."""


@dataclass
class _Block:
    # How many bytes lie in the slot; None: they could not be written there.
    held: "Future[int | None]"
    slot: int
    readers: int = 0
    served: int = 0
    touched: int = 0

    @property
    def consumed(self) -> bool:
        """Whether one pass is through with it."""
        return self._idle and self.served >= (self.held.result() or 0)

    @property
    def _idle(self) -> bool:
        return self.readers == 0 and self.held.done() and self.held.exception() is None

    def left_behind(self, served: int, bound: int) -> bool:
        """Whether nobody touched it while twice the cache's size was read: parts of it are never asked for."""
        return self._idle and served - self.touched > 2 * bound


class BlockCache:
    """At most `size` bytes of remote files, in a nameless file in `directory`; a context, and empty after it."""

    def __init__(self, directory: Path, *, size: int = DEFAULT_BYTES) -> None:
        self._directory = directory
        self._slots = size // BLOCK
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._descriptor = -1
        self._pool: ThreadPoolExecutor | None = None
        # In the order they were fetched.
        self._blocks: dict[tuple[object, int], _Block] = {}
        self._free: list[int] = []
        self._used = 0
        self._served = 0

    def __enter__(self) -> "BlockCache":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._stack.close()
        self._blocks.clear()

    def read_into(self, file: object, position: int, buffer: memoryview, *, size: int, fetch: Fetch) -> int:
        """Fill `buffer` with the bytes from `position` on and return how many there were.

        `file` is any key that names one version of one file of `size` bytes. Raises what `fetch` raises.
        """
        buffer = buffer[: max(0, size - position)]
        total = 0
        while total < len(buffer):
            start = position + total
            part = buffer[total : total + BLOCK - start % BLOCK]
            count = self._serve(file, start, part, size=size, fetch=fetch)
            total += count
            if count < len(part):
                break
        return total

    def _serve(self, file: object, start: int, part: memoryview, *, size: int, fetch: Fetch) -> int:
        index, offset = divmod(start, BLOCK)
        block = self._enter(file, index, size=size, fetch=fetch)
        held = None
        if block is not None:
            try:
                held = block.held.result()
                if held is not None:
                    count = max(0, min(len(part), held - offset))
                    return os.preadv(self._descriptor, [part[:count]], block.slot * BLOCK + offset) if count else 0
            finally:
                self._leave(file, index, block, len(part))
        with self._lock:
            self._served += len(part)
        content = fetch(start, start + len(part))
        part[: len(content)] = content
        return len(content)

    def _enter(self, file: object, index: int, *, size: int, fetch: Fetch) -> _Block | None:
        """Return the block, on its way or there, held until it is left; None when there is no room for it."""
        with self._lock:
            for number in range(index, min(index + 1 + AHEAD, -(-size // BLOCK))):
                if (file, number) not in self._blocks:
                    slot = self._slot(urgent=number == index)
                    if slot is None:
                        break
                    self._blocks[file, number] = _Block(self._start(slot, number, size, fetch), slot)
            block = self._blocks.get((file, index))
            if block is not None:
                block.readers += 1
            return block

    def _leave(self, file: object, index: int, block: _Block, count: int) -> None:
        with self._lock:
            self._served += count
            block.readers -= 1
            block.served += count
            block.touched = self._served
            raised = block.held.exception() is not None
            if (raised or block.held.result() is None) and self._blocks.get((file, index)) is block:
                del self._blocks[file, index]
            if raised and block.readers == 0:
                self._free.append(block.slot)

    def _slot(self, *, urgent: bool) -> int | None:
        if self._free:
            return self._free.pop()
        if self._used < self._slots:
            self._used += 1
            return self._used - 1
        victim = next((key for key, block in reversed(self._blocks.items()) if block.consumed), None)
        if victim is None and urgent:
            bound = self._slots * BLOCK
            victim = next((key for key, block in self._blocks.items() if block.left_behind(self._served, bound)), None)
        return self._blocks.pop(victim).slot if victim is not None else None

    def _start(self, slot: int, number: int, size: int, fetch: Fetch) -> "Future[int | None]":
        if self._pool is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._directory))  # noqa: SIM115
            self._descriptor = file.fileno()
            self._pool = ThreadPoolExecutor(FETCHES, thread_name_prefix="relex-fetch")
        return self._pool.submit(self._bring, slot, number, size, fetch)

    def _bring(self, slot: int, number: int, size: int, fetch: Fetch) -> int | None:
        content = memoryview(fetch(number * BLOCK, min((number + 1) * BLOCK, size)))
        written = 0
        try:
            while written < len(content):
                written += os.pwrite(self._descriptor, content[written:], slot * BLOCK + written)
        except OSError:
            # The disk is full: what is there stays, and nothing more is kept.
            with self._lock:
                self._slots = 0
            return None
        return len(content)
