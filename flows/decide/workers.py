"""Ranges of a Gram and shards of predictions as Prefect tasks on Dask workers, on this machine or on several.

Every worker reads the base, the checkpoints and the training run's state under the same paths. A worker that dies costs
the range it was reading or the shard it was writing: Dask gives it to another one.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun

from flows.errors import ShardError
from flows.settings import Settings
from relex import ranges
from relex.errors import RelexError
from relex.files.block_cache import BlockCache
from relex.output import shards
from relex.output.shards import Shard, Spread
from relex.progress import Progress
from relex.ranges import Range, Share

Work = TypeVar("Work", Shard, Range)


def write_shard(piece: Shard, cache: int) -> None:
    """Write one shard; what is read from a URL is kept in `cache` bytes of the worker's own disk meanwhile."""
    with BlockCache(Path(tempfile.gettempdir()), size=cache) as blocks:
        shards.write_shard(piece, blocks=blocks)


def measure_range(piece: Range, cache: int) -> bytes:
    """Take one range of a Gram; what is read from a URL is kept in `cache` bytes of the worker's own disk meanwhile."""
    with BlockCache(Path(tempfile.gettempdir()), size=cache) as blocks:
        return ranges.measure_range(piece, blocks=blocks)


def _may_pass(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    """Whether a second attempt may do better: not where the first one was refused."""
    return not isinstance(state.data, RelexError)


shard_task = task(
    name="shard",
    task_run_name="{piece.file}",
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,
)(write_shard)
range_task = task(
    name="range",
    task_run_name="units {piece.start} to {piece.stop}",
    retries=2,
    retry_delay_seconds=2,
    retry_condition_fn=_may_pass,
    cache_policy=NO_CACHE,
)(measure_range)


def spreading(settings: Settings) -> Spread | None:
    """Return what hands shards to other processes; None where the threads of this one write them."""
    return None if settings.task_runner == "threads" else partial(_spread, settings)


def sharing(settings: Settings) -> Share | None:
    """Return what hands ranges of a Gram to other processes; None where the threads of this one take it."""
    return None if settings.task_runner == "threads" else partial(_share, settings)


def _spread(settings: Settings, pieces: Sequence[Shard], on_progress: Progress | None) -> None:
    if not pieces:
        return
    with _runner(settings) as runner:
        futures = _submitted(settings, runner, shard_task, pieces)
        for done, future in enumerate(futures, 1):
            future.wait()
            if on_progress is not None:
                on_progress(done, len(futures))
        # Not before all have ended: what was begun is taken back only when nobody writes it any more.
        for future in futures:
            future.result()


def _share(settings: Settings, pieces: Sequence[Range]) -> Iterator[bytes]:
    with _runner(settings) as runner:
        for future in _submitted(settings, runner, range_task, pieces):
            yield future.result()


def _submitted(settings: Settings, runner: Any, wanted: Task[..., Any], pieces: Sequence[Work]) -> list[Any]:
    if settings.dask_address is None:
        # The budget is this machine's, and a process a core replaces a thread a core.
        own = settings.threads
        pieces = [replace(piece, memory=piece.memory // own, threads=1) for piece in pieces]
    try:
        return [runner.submit(wanted, {"piece": piece, "cache": int(settings.cache)}) for piece in pieces]
    except OSError as error:
        raise ShardError(
            f"dask_address {settings.dask_address} does not answer ({' '.join(str(error).split())}). Start"
            " `dask scheduler` there, and `dask worker` on each machine."
        ) from error


def _runner(settings: Settings) -> Any:
    from prefect_dask.task_runners import DaskTaskRunner

    if settings.dask_address is not None:
        return DaskTaskRunner(address=settings.dask_address)
    # Bounded by our own budget; Dask would count the page cache too, and end workers for it.
    cluster = {
        "n_workers": settings.threads,
        "threads_per_worker": 1,
        "memory_limit": None,
        "dashboard_address": "127.0.0.1:0",
    }
    return DaskTaskRunner(cluster_kwargs=cluster)
