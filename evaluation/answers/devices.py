"""Devices: which ones each worker of an evaluation has, and how many evaluations a device has at once."""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from platformdirs import user_runtime_path

from evaluation.answers.backend import Backend
from evaluation.errors import DeviceError

# A model without weights: what a worker has that only reads journals.
NO_WEIGHTS = "meta"
MASK = "CUDA_VISIBLE_DEVICES"
_POLL_SECONDS = 0.1


def device_kind(device: str) -> str:
    """Return cpu or cuda; which of a machine's equal GPUs answers, or how many of them, is no setting."""
    return device.split(",", maxsplit=1)[0].split(":", maxsplit=1)[0]


def worker_devices(device: str, backend: Backend) -> list[str]:
    """Return the devices of each worker, as many to one as the backend's engine spans.

    `device` is cpu, cuda, cuda:N, or several of one kind with commas between. Raises DeviceError for anything else, for
    a GPU that is named twice, and for a number of GPUs that fills no whole engines.
    """
    names = device.split(",")
    if not all(re.fullmatch(r"cpu|cuda(:\d+)?", name) for name in names) or len(set(map(device_kind, names))) > 1:
        raise DeviceError(f"device is {device} and must be cpu, cuda or cuda:N, or several of a kind: cuda:0,cuda:1.")
    indices = [cuda_index(name) for name in names]
    if device_kind(device) == "cuda" and len(set(indices)) < len(indices):
        raise DeviceError(f"device {device} names a GPU twice: one worker fills it.")
    size = backend.tensor_parallel_size
    if len(names) % size:
        raise DeviceError(
            f"device {device} names {len(names)} and an engine of the backend spans {size}: name a multiple of {size}, "
            "or lower tensor_parallel_size."
        )
    return [",".join(names[start : start + size]) for start in range(0, len(names), size)]


def cuda_index(name: str) -> int:
    """Return the number of a CUDA device; plain cuda is the first."""
    return int(name.partition(":")[2] or 0)


def mask(device: str, environment: Mapping[str, str]) -> str:
    """Return the CUDA_VISIBLE_DEVICES that leaves a process these CUDA devices of those it sees now."""
    seen = [each for each in environment.get(MASK, "").split(",") if each]
    chosen = map(cuda_index, device.split(","))
    return ",".join(seen[index] if seen else str(index) for index in chosen)


@contextmanager
def occupied(
    device: str,
    environment: Mapping[str, str],
    *,
    evaluations: int | None = None,
    on_wait: Callable[[str], None],
    directory: Path | None = None,
) -> Iterator[None]:
    """Hold a place on each device of `device` in the block; where all of them are taken, one is waited for.

    A GPU has `evaluations` places, one by default. The CPU has that many, and where none is given it is everybody's.
    Evaluations that are given different numbers take the first free place below their own, so the largest number bounds
    how many run at once. `on_wait` gets the name of a device that has to be waited for. The places are locks in
    `directory`, by default the user's runtime directory, and end with the process however it ends.
    """
    with ExitStack() as places:
        if device_kind(device) == "cuda":
            # In one order for everybody: two evaluations of two GPUs cannot wait for each other.
            names = [f"gpu-{name.replace('/', '-')}" for name in sorted(mask(device, environment).split(","))]
        else:
            names = [] if evaluations is None or device_kind(device) != "cpu" else ["cpu"]
        if names:
            where = directory or user_runtime_path("relex", ensure_exists=True)
            for name in names:
                locks = [FileLock(where / f"{name}.{place}.lock") for place in range(evaluations or 1)]
                places.callback(_first_free(locks, partial(on_wait, _title(name))).release)
        yield


def _first_free(locks: Sequence[FileLock], on_wait: Callable[[], None]) -> FileLock:
    """Return the first lock that can be had, held; `on_wait` is called once where all of them are others'."""
    waiting = False
    while True:
        for lock in locks:
            with suppress(Timeout):
                lock.acquire(timeout=0)
                return lock
        if not waiting:
            on_wait()
            waiting = True
        time.sleep(_POLL_SECONDS)


def _title(name: str) -> str:
    return "the CPU" if name == "cpu" else f"GPU {name.removeprefix('gpu-')}"
