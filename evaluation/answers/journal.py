"""Journal: a model's answers, kept chunk by chunk so that a killed evaluation goes on where it stopped.

One line of JSON a chunk, flushed to the disk before the next chunk is asked for. A last line torn by a kill is dropped;
damage anywhere else is refused.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from evaluation.errors import JournalError


class Journal:
    """Answers of finished chunks by chunk key; one process at a time, the caller holds the lock.

    What the journals in `others` hold is found too; their processes may be writing them.

    `seconds` is what the chunks took that were found or appended since the journal was opened: those of other limits
    lie in it too.
    """

    def __init__(self, path: Path, others: Sequence[Path] = ()) -> None:
        """Open `path`, creating it if absent; JournalError when a line before the last is no chunk."""
        self._chunks: dict[str, tuple[list[Any], float]] = {}
        self._file = path.open("a+b")
        self.seconds = 0.0
        for other in others:
            with other.open("rb") as file:
                self._replay(other, file)
        self._file.seek(0)
        self._file.truncate(self._replay(path, self._file))
        self._file.seek(0, os.SEEK_END)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def find(self, key: str) -> list[Any] | None:
        """Return the answers of the chunk, None when it was never finished."""
        if key not in self._chunks:
            return None
        answers, seconds = self._chunks[key]
        self.seconds += seconds
        return answers

    def append(self, key: str, answers: list[Any], *, seconds: float) -> None:
        """Keep the answers of a finished chunk that took `seconds`; on return they are on the disk."""
        line = json.dumps({"chunk": key, "seconds": seconds, "answers": answers}, allow_nan=False)
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.seconds += seconds

    def _replay(self, path: Path, lines: Iterable[bytes]) -> int:
        complete = 0
        for number, line in enumerate(lines, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                entry = json.loads(line)
                self._chunks[entry["chunk"]] = (entry["answers"], float(entry["seconds"]))
            except (ValueError, TypeError, KeyError) as error:
                raise JournalError(f"{path}: line {number} is damaged. Delete the file and evaluate again.") from error
            complete += len(line)
        return complete
