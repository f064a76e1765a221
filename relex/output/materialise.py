"""Predicted weights as model directories: coefficients times trajectory, many predictions in one pass."""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from relex import rank_one
from relex.errors import OutputError, RelexError
from relex.forecast import Forecast
from relex.output import manifest
from relex.output.adapter import write_adapter
from relex.output.manifest import FileRecord
from relex.output.shards import Spread, announced, fill, missing_shards, output_tensors, reopen
from relex.output.writer import ModelWriter, open_writer, side_files
from relex.progress import Progress
from relex.trajectory import Trajectory


@dataclass(frozen=True)
class Output:
    """One prediction and the directory it becomes."""

    forecast: Forecast
    directory: Path


def materialise(
    trajectory: Trajectory,
    outputs: Sequence[Output],
    *,
    contents: Tensor | None = None,
    memory: int,
    threads: int,
    shard_size: int | None = None,
    spread: Spread | None = None,
    begun: Mapping[Path, ModelWriter] | None = None,
    command: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> None:
    """Write every output that is not there yet, in one pass within `memory` bytes, going on after a killed call.

    The files are cut as the base's are, or at `shard_size` bytes. With `spread` other processes write them, each within
    `memory`; all paths must then mean the same to all of them. `begun` are writers, by directory, of outputs that were
    begun while the Gram was taken. Raises OutputError when a directory holds something
    else, NonFiniteError when a prediction leaves the range of its precision, CheckpointChangedError when an input
    changed meanwhile (then nothing is left behind).
    """
    forecasts = [output.forecast for output in outputs]
    begun = begun or {}
    writers = {i: begun[output.directory] for i, output in enumerate(outputs) if output.directory in begun}
    try:
        for index, output in enumerate(outputs):
            if index in writers:
                continue
            tensors = output_tensors(trajectory, output.forecast.dtype, shard_size)
            writer = open_writer(output.directory, output.forecast.digest, tensors)
            if writer is not None:
                writers[index] = writer
        provenance = {index: partial(_manifest, forecasts[index], trajectory, command, shard_size) for index in writers}
        if spread is None:
            fill(
                trajectory,
                forecasts,
                writers,
                contents=contents,
                memory=memory,
                threads=threads,
                on_progress=on_progress,
            )
        else:
            for index, writer in writers.items():
                writer.announce(_vectors(forecasts[index]) | announced(contents), provenance[index]({}))
            spread(missing_shards(trajectory, list(writers.values()), memory=memory, threads=threads), on_progress)
        trajectory.check_unchanged()
        for index, writer in writers.items():
            files = side_files(trajectory.base, trajectory.checkpoints[-1].weights)
            dtype = forecasts[index].dtype
            if dtype != "base":
                config = json.loads(files["config.json"]) | {"dtype": dtype}
                files["config.json"] = (json.dumps(config, indent=2) + "\n").encode()
            writer.publish(files | _vectors(forecasts[index]), provenance[index])
    except RelexError:
        for writer in writers.values():
            if writer.partial.exists():
                writer.discard()
        raise
    finally:
        for writer in writers.values():
            writer.release()


def _vectors(forecast: Forecast) -> dict[str, bytes]:
    return {rank_one.FILE_NAME: rank_one.to_bytes(forecast.vectors)} if forecast.vectors else {}


def _manifest(
    forecast: Forecast,
    trajectory: Trajectory,
    command: Sequence[str],
    shard_size: int | None,
    files: Mapping[str, FileRecord],
) -> dict[str, Any]:
    return manifest.make(forecast, trajectory, files, command=command, shard_size=shard_size).to_json()


def rebuild(directory: Path, out: Path, *, memory: int, threads: int) -> None:
    """Build the model that the manifest in `directory` describes once more, into `out`, and compare every file with it.

    The base and the checkpoints must still lie where they did. Raises OutputError when `out` exists, or when a file
    comes out different, which means an input has changed; `out` is then removed.
    """
    old = manifest.read(directory)
    if out.exists():
        raise OutputError(f"output {out} exists; to rebuild {directory} is to write it afresh. Give another directory.")
    trajectory = reopen(old)
    forecast = manifest.with_vectors(old.forecast, directory)
    if old.adapter is not None:
        write_adapter(trajectory, forecast, out, memory=memory, threads=threads, command=old.command)
    else:
        outputs = [Output(forecast, out)]
        materialise(trajectory, outputs, memory=memory, threads=threads, shard_size=old.shard_size, command=old.command)
    new = manifest.read(out)
    for name in sorted(old.files.keys() | new.files.keys()):
        was, now = old.files.get(name), new.files.get(name)
        if was != now:
            shutil.rmtree(out)
            raise OutputError(
                f"{directory / name} comes out with {_described(now)} and was {_described(was)}: a checkpoint or the"
                " base is not what it was. Bring the old ones back, or predict again."
            )


def _described(record: FileRecord | None) -> str:
    return "no file" if record is None else f"{record.size} bytes, sha256 {record.sha256[:12]}…"
