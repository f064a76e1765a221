"""Small JSON files, each complete or absent, read back as the type that was written."""

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from relex.files.whole import write_whole

Record = TypeVar("Record")


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is complete or absent, also after a power cut; OutputError where there is no room for it."""
    write_whole((json.dumps(content, indent=1) + "\n").encode(), path)


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
