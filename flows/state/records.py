"""Small JSON files, each complete or absent, read back as the type that was written."""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

Record = TypeVar("Record")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is complete or absent, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.tmp")
    with hidden.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    hidden.replace(path)


def read_json(path: Path, kind: type[Record]) -> Record:
    """Read back a dataclass that was written as its fields; further keys are passed over.

    Raises FileNotFoundError, and pydantic's ValidationError for anything else.
    """
    # A type is hashable, whatever mypy says of its metaclass.
    record: Record = _adapter(kind).validate_json(path.read_bytes())  # type: ignore[arg-type]
    return record


# Made once a type: the watcher reads all the time.
@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
