"""A registered artifact: the directory of one LoggedModel, made of hard links to the candidate's files.

MLmodel                what MLflow reads to load it
model/                 the candidate itself, relex.json included: a plain from_pretrained directory
components/tokenizer/  its small files again, where mlflow.transformers looks for the tokenizer
gate/                  what it was judged by, problem by problem; each file is named by its content
"""

import errno
import json
import platform
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.candidate import MANIFEST, Candidate, FileRecord, listed_files, sha256_of
from deploy.errors import CandidateError, DigestConflictError
from deploy.files import flush, unfinished_path, write_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL = "model"
GATE = "gate"
_TOKENIZER = "components/tokenizer"
# What os.link answers where two directories cannot share a file: another file system, one without links, another
# owner's file, or too many links already.
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP)


def build(candidate: Candidate, directory: Path, *, model_id: str, created_ms: int) -> None:
    """Make `directory` hold the candidate, whatever an earlier call left there; on one file system no byte is copied.

    DigestConflictError where another candidate lies there under the same digest; CandidateError where a file changed
    since it was verified.
    """
    _refuse_conflict(candidate, directory / MODEL / MANIFEST)
    for name, record in candidate.files.items():
        _place(candidate.path / name, directory / MODEL / name, record)
    for name in _small_files(candidate):
        _place(candidate.path / name, directory / _TOKENIZER / name, candidate.files[name])
    _write_descriptions(candidate, directory, model_id=model_id, created_ms=created_ms)
    # Last: with its manifest in place the model is whole.
    _write(directory / MODEL / MANIFEST, (candidate.path / MANIFEST).read_text())


def upload(candidate: Candidate, client: "MlflowClient", *, model_id: str, created_ms: int) -> None:
    """Copy the candidate once to an artifact store that is not a directory of this file system."""
    client.log_model_artifacts(model_id, str(candidate.path), MODEL)
    for name in _small_files(candidate):
        folder = (Path(_TOKENIZER) / name).parent.as_posix()
        client.log_model_artifact(model_id, str(candidate.path / name), folder)
    with tempfile.TemporaryDirectory() as scratch:
        _write_descriptions(candidate, Path(scratch), model_id=model_id, created_ms=created_ms)
        client.log_model_artifacts(model_id, scratch)


def add_reports(directory: Path | None, reports: Sequence[Path], client: "MlflowClient", model_id: str) -> list[str]:
    """Keep files beside the model, uploaded where `directory` is None; returns the SHA-256 of each, its name here."""
    names = []
    for report in reports:
        names.append(sha256_of(report))
        if directory is not None:
            kept = directory / GATE / f"{names[-1]}.json"
            if kept.exists() and sha256_of(kept) != names[-1]:
                kept.unlink()
            _write(kept, report.read_text())
            continue
        with tempfile.TemporaryDirectory() as scratch:
            named = Path(scratch) / f"{names[-1]}.json"
            shutil.copyfile(report, named)
            client.log_model_artifact(model_id, str(named), GATE)
    return names


def _small_files(candidate: Candidate) -> Iterator[str]:
    for name in candidate.files:
        if not name.endswith((".safetensors", ".safetensors.index.json")):
            yield name


def _refuse_conflict(candidate: Candidate, manifest: Path) -> None:
    try:
        registered = listed_files(manifest, json.loads(manifest.read_bytes()))
    except FileNotFoundError:
        return
    except (ValueError, CandidateError):
        # Damaged since: the candidate's takes its place.
        manifest.unlink()
        return
    if registered != candidate.files:
        name = next(n for n in sorted({*registered, *candidate.files}) if registered.get(n) != candidate.files.get(n))
        raise DigestConflictError(
            f"digest {candidate.digest} is registered already and {name} differs: {registered.get(name)} there, "
            f"{candidate.files.get(name)} in {candidate.path}. Predict again; equal inputs give equal bytes."
        )


def _place(source: Path, target: Path, record: FileRecord) -> None:
    if target.exists():
        if target.samefile(source) or (target.stat().st_size == record.size and sha256_of(target) == record.sha256):
            return
        target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _copy(source, target)
    if (size := target.stat().st_size) != record.size:
        target.unlink()
        raise CandidateError(
            f"{source} changed from {record.size} to {size} bytes since it was verified. Run it again."
        )


def _copy(source: Path, target: Path) -> None:
    unfinished = unfinished_path(target)
    shutil.copyfile(source, unfinished)
    flush(unfinished)
    unfinished.replace(target)


def _write_descriptions(candidate: Candidate, directory: Path, *, model_id: str, created_ms: int) -> None:
    requirements = "".join(f"{package}=={version(package)}\n" for package in ("mlflow", "torch", "transformers"))
    _write(directory / "MLmodel", _mlmodel(candidate, model_id=model_id, created_ms=created_ms))
    _write(directory / "requirements.txt", requirements)


def _write(path: Path, text: str) -> None:
    # What was registered stays as it was.
    if not path.exists():
        write_file(path, text)


def _mlmodel(candidate: Candidate, *, model_id: str, created_ms: int) -> str:
    from mlflow.models import Model

    config = json.loads((candidate.path / "config.json").read_bytes())
    model = Model(
        model_id=model_id,
        model_uuid=model_id.removeprefix("m-"),
        utc_time_created=datetime.fromtimestamp(created_ms / 1000, UTC).replace(tzinfo=None),
        model_size_bytes=sum(record.size for record in candidate.files.values()),
        metadata={"digest": candidate.digest, "target_step": candidate.target_step},
    )
    model.add_flavor(
        "transformers",
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=config["architectures"][0],
        source_model_name=candidate.path.name,
        model_binary=MODEL,
        components=["tokenizer"] if "tokenizer_config.json" in candidate.files else [],
        # Ships with transformers whatever the tokenizer is; with a name it does not know MLflow trusts remote code.
        tokenizer_type="AutoTokenizer",
        transformers_version=version("transformers"),
    )
    model.add_flavor("python_function", loader_module="mlflow.transformers", python_version=platform.python_version())
    return str(model.to_yaml())
