"""A candidate: a predicted model directory that is exactly what its manifest says."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from deploy.errors import CandidateError

MANIFEST = "relex.json"

# What loading a model needs and nothing that could run: weights, configuration, chat templates, tokenizers. The last
# name is what some predictions were made with, as plain arrays; no loader looks at it.
_KINDS = (".safetensors", ".json", ".jinja")
_NAMES = (
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "merges.txt",
    "vocab.txt",
    "relex-vectors.npz",
)
# Keys that make transformers import code named by the checkpoint; MLflow loads with trust_remote_code=True.
_CODE_KEYS = ("auto_map", "custom_pipelines")
# Far more than a manifest or a configuration takes.
_MOST_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class FileRecord:
    """The size in bytes and the hexadecimal SHA-256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Candidate:
    """A verified model directory: its digest, the training step it predicts, its files by relative POSIX name."""

    path: Path
    digest: str
    target_step: int
    files: Mapping[str, FileRecord]
    manifest: Mapping[str, object]


def verify(path: Path, *, contents: Literal["read", "sizes"] = "read") -> Candidate:
    """Return the candidate in `path` after reading every byte of it, or with "sizes" only its small files.

    Refuses with CandidateError a missing or malformed relex.json, a file that is missing, extra, a link, or of
    another size or SHA-256 than listed, a kind of file that a model does not need, and configuration that names code.
    """
    path = path.resolve()
    manifest = _manifest(path)
    files = listed_files(path / MANIFEST, manifest)
    present = set(_present(path))
    if missing := sorted(files.keys() - present):
        raise CandidateError(
            f"{path} is not complete: {MANIFEST} lists {len(files)} files and {missing[0]} is not there "
            f"({len(missing)} missing). Predict the model again."
        )
    if extra := sorted(present - files.keys() - {MANIFEST}):
        raise CandidateError(f"{path} holds {extra[0]}, which {MANIFEST} does not list. Remove it, or predict again.")
    for name, record in files.items():
        _verify_file(path / name, record, contents=contents)
        if name.endswith("config.json"):
            _refuse_code(path / name)
    digest, target_step = manifest.get("digest"), manifest.get("target_step")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{8,128}", digest):
        raise CandidateError(f"{path / MANIFEST} has digest {digest!r}, not 8 to 128 hex digits. Predict again.")
    if not isinstance(target_step, int):
        raise CandidateError(f"{path / MANIFEST} has target_step {target_step!r}, not a step number. Predict again.")
    return Candidate(path, digest, target_step, files, manifest)


def listed_files(where: Path, manifest: Mapping[str, object]) -> dict[str, FileRecord]:
    """Return the files the manifest read from `where` lists; CandidateError where they are malformed."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not files:
        raise CandidateError(f"{where} lists no files. Predict the model again.")
    records = {}
    for name, entry in files.items():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            raise CandidateError(f"{where} describes {name} as {entry!r}, not by size and sha256. Predict again.")
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise CandidateError(f"{where} lists {name}, which lies outside the directory. Do not use this model.")
        if not name.endswith(_KINDS) and PurePosixPath(name).name not in _NAMES:
            made_of = f"{', '.join(f'*{kind}' for kind in _KINDS)}, {', '.join(_NAMES)}"
            raise CandidateError(f"{where} lists {name}; a model is made of {made_of}. Remove it.")
        records[name] = FileRecord(entry["size"], str(entry.get("sha256")))
    return records


def digest_of(files: Mapping[str, FileRecord]) -> str:
    """Return a hexadecimal SHA-256 that names a list of files with their contents."""
    listed = sorted((name, record.size, record.sha256) for name, record in files.items())
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


def sha256_of(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest(path: Path) -> dict[str, object]:
    try:
        manifest = _read_json(path / MANIFEST)
    except (OSError, ValueError, RecursionError) as error:
        raise CandidateError(f"{path / MANIFEST} cannot be read ({error}). Name a predicted directory.") from error
    if not isinstance(manifest, dict):
        raise CandidateError(f"{path / MANIFEST} holds a {type(manifest).__name__}, not an object. Predict again.")
    return manifest


def _read_json(path: Path) -> Any:
    if (size := path.stat().st_size) > _MOST_JSON_BYTES:
        raise ValueError(f"it has {size} bytes, and at most {_MOST_JSON_BYTES} are read")
    return json.loads(path.read_bytes())


def _present(path: Path) -> Iterator[str]:
    for entry in path.rglob("*"):
        # A link could point at bytes that change after they were verified.
        if entry.is_symlink():
            raise CandidateError(f"{entry} is a symbolic link. Put the file itself there.")
        if not entry.is_dir():
            yield entry.relative_to(path).as_posix()


def _verify_file(path: Path, record: FileRecord, *, contents: Literal["read", "sizes"]) -> None:
    size = path.stat().st_size
    if size != record.size:
        raise CandidateError(f"{path} has {size} bytes and {MANIFEST} lists {record.size}. Predict the model again.")
    if contents == "read" and (sha256 := sha256_of(path)) != record.sha256:
        raise CandidateError(
            f"{path} has SHA-256 {sha256} and {MANIFEST} lists {record.sha256}: it changed. Predict the model again."
        )


def _refuse_code(path: Path) -> None:
    try:
        keys = set(_keys(_read_json(path)))
    except (ValueError, RecursionError) as error:
        raise CandidateError(f"{path} is not JSON ({error}). Repair the base model's and predict again.") from error
    if key := next((key for key in _CODE_KEYS if key in keys), None):
        raise CandidateError(
            f"{path} has {key}, which makes whoever loads the model run code from it. Remove {key} from the base model."
        )


def _keys(content: object) -> Iterator[str]:
    if isinstance(content, dict):
        yield from content
        content = list(content.values())
    if isinstance(content, list):
        for value in content:
            yield from _keys(value)
