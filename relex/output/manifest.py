"""`relex.json`, the provenance beside every predicted model: enough to rebuild it bit for bit, and to notice damage."""

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

from relex import __version__, rank_one
from relex.errors import CheckpointError, OutputError
from relex.files.location import open_directory
from relex.forecast import FORMAT, Forecast
from relex.trajectory import Trajectory

FILE_NAME = "relex.json"


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and sha256 of one file of the output."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read the whole file."""
        with path.open("rb") as file:
            return cls(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


@dataclass(frozen=True)
class AdapterRecord:
    """What an adapter holds of its prediction, by adapted module: its rank, and the relative Frobenius error."""

    ranks: Mapping[str, int]
    errors: Mapping[str, float]

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values())

    @property
    def error(self) -> float:
        """The largest error."""
        return max(self.errors.values())


@dataclass(frozen=True)
class Manifest:
    """What was predicted, from what, by what, and every file that came of it.

    `digest` names the prediction (equal inputs, equal digest); `checkpoints` are the observed ones' directories in step
    order; `adapter` is there when it was written as one, `shard_size` (bytes) when it was not cut as the base is.
    """

    digest: str
    forecast: Forecast
    base: str
    checkpoints: tuple[str, ...]
    files: Mapping[str, FileRecord]
    versions: Mapping[str, str]
    command: tuple[str, ...]
    adapter: AdapterRecord | None = None
    shard_size: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; the forecast's method, target and window stand at the top for a reader's eye."""
        head = {"format": FORMAT, "digest": self.digest, "method": self.forecast.description}
        head |= {"target_step": self.forecast.target_step, "window": self.forecast.steps}
        rest: dict[str, Any] = {"base": self.base, "checkpoints": self.checkpoints}
        rest |= {"versions": self.versions, "command": self.command}
        files = {name: asdict(record) for name, record in self.files.items()}
        if self.adapter is not None:
            rest["adapter"] = {"rank": self.adapter.rank, "error": self.adapter.error} | asdict(self.adapter)
        if self.shard_size is not None:
            rest["shard_size"] = self.shard_size
        return head | rest | {"files": files, "forecast": self.forecast.to_json()}


def make(
    forecast: Forecast,
    trajectory: Trajectory,
    files: Mapping[str, FileRecord],
    *,
    command: Sequence[str],
    shard_size: int | None = None,
) -> Manifest:
    """Put the manifest of a finished output together."""
    versions = {
        "relex": __version__,
        **{name: version(name) for name in ("torch", "safetensors")},
        "python": platform.python_version(),
    }
    checkpoints = tuple(str(checkpoint.weights.directory) for checkpoint in trajectory.checkpoints)
    return Manifest(
        forecast.digest,
        forecast,
        str(trajectory.base.directory),
        checkpoints,
        dict(files),
        versions,
        tuple(command),
        shard_size=shard_size,
    )


def read(location: str | Path) -> Manifest:
    """Read the manifest of a predicted model, here or in a store; raises OutputError when there is none in it."""
    path = f"{location}/{FILE_NAME}"
    try:
        content = json.loads(open_directory(location).read(FILE_NAME))
        if content["format"] != FORMAT:
            raise OutputError(f"{path} has format {content['format']}, this relex reads {FORMAT}. Predict again.")
        adapter = content.get("adapter")
        return Manifest(
            content["digest"],
            Forecast.from_json(content["forecast"]),
            content["base"],
            tuple(content["checkpoints"]),
            {name: FileRecord(**record) for name, record in content["files"].items()},
            content["versions"],
            tuple(content["command"]),
            AdapterRecord(adapter["ranks"], adapter["errors"]) if adapter is not None else None,
            content.get("shard_size"),
        )
    except FileNotFoundError:
        raise OutputError(f"{location} has no {FILE_NAME}: relex did not write it.") from None
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise OutputError(
            f"{path} is no manifest of relex ({error!r}). Predict again into another directory."
        ) from error


def with_vectors(forecast: Forecast, directory: Path) -> Forecast:
    """Return a forecast that was read back with the vectors that lie beside its manifest.

    Raises OutputError when they are not those it was made with.
    """
    expected = {name: tensor.vectors for name, tensor in forecast.tensors.items() if tensor.vectors}
    path = directory / rank_one.FILE_NAME
    if not expected:
        return forecast
    try:
        vectors = rank_one.from_bytes(path.read_bytes())
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise OutputError(f"{path} cannot be read ({error}). Bring it back, or predict again.") from error
    digests = {name: matrix.digest for name, matrix in vectors.items()}
    if digests != expected:
        raise OutputError(
            f"{path} holds vectors of {len(digests)} tensors that are not those of the {len(expected)} in {FILE_NAME}."
            " Bring it back, or predict again."
        )
    return replace(forecast, vectors=vectors)


def verify(directory: Path) -> Manifest:
    """Read the manifest and compare every file with it; raises OutputError with both values of the first difference."""
    manifest = read(directory)
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise OutputError(f"{path} is missing; the manifest lists it with {expected.size} bytes. Predict again.")
        record = FileRecord.of(path)
        if record != expected:
            raise OutputError(
                f"{path} has {record.size} bytes, sha256 {record.sha256[:12]}…; the manifest says {expected.size}"
                f" bytes, {expected.sha256[:12]}…. Delete {directory} and predict again."
            )
    return manifest
