"""Digest: the sha256 that names a value or a file by its content."""

import hashlib
import json
from pathlib import Path


def digest_value(value: object) -> str:
    """Return the sha256 (hex) of `value` as canonical JSON; TypeError or ValueError if JSON cannot hold it."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Return the sha256 (hex) of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
