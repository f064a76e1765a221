"""Job: what the parent asks of one worker process, as the line of JSON that crosses the pipe."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evaluation.answers.backend import HF, Backend
from evaluation.answers.fingerprint import LogitsExtrapolation
from evaluation.digest import digest_value
from evaluation.verdict.report import Setting


@dataclass(frozen=True)
class WorkerPart:
    """One worker's share of the chunks of every benchmark: those whose number leaves `index` when divided by `of`."""

    index: int
    of: int

    def holds(self, chunk: int) -> bool:
        """Return whether a chunk is this worker's; which one is settled whatever is answered already."""
        return chunk % self.of == self.index


WHOLE = WorkerPart(0, 1)


class AnsweredPart(Exception):  # nothing went wrong
    """Everything is answered that a worker with a part of the chunks was to answer: there is nothing to score."""


@dataclass(frozen=True)
class Assignment:
    """One benchmark to score, under settings that equal those of every other model it is compared with."""

    benchmark: str
    benchmark_path: str
    benchmark_digest: str
    model_digest: str
    settings: Mapping[str, Setting]
    cache: str

    @property
    def directory(self) -> Path:
        """Return the directory of this evaluation: its journals, their locks, the logs and at last a report a limit.

        Every limit has the same directory: what the first problems were answered is what they are answered again.
        """
        key = digest_value([self.model_digest, self.benchmark_digest, {**self.settings, "limit": None}])
        return Path(self.cache) / f"{self.benchmark}-{key[:24]}"

    @property
    def report_path(self) -> Path:
        """Return the path of the report, which is complete or absent."""
        return self.directory / f"report{self._limit_suffix}.json"

    @property
    def results_path(self) -> Path:
        """Return the path of lm-eval's own results, complete or absent."""
        return self.directory / f"results{self._limit_suffix}.json"

    @property
    def samples_path(self) -> Path:
        """Return the path of lm-eval's own samples, complete or absent."""
        return self.directory / f"samples{self._limit_suffix}.jsonl"

    @property
    def complete(self) -> bool:
        """Return whether the report and what it was made of are there."""
        return all(path.exists() for path in (self.report_path, self.results_path, self.samples_path))

    @property
    def _limit_suffix(self) -> str:
        limit = self.settings.get("limit")
        return "" if limit is None else f"-first-{limit}"

    def journal_path(self, part: WorkerPart) -> Path:
        """Return the path of the journal that the worker with this part writes."""
        return self.directory / f"journal{_suffix(part)}.jsonl"

    def other_journals(self, part: WorkerPart) -> list[Path]:
        """Return the paths of the journals that workers with other parts have written so far, or write now."""
        return sorted({*self.directory.glob("journal*.jsonl")} - {self.journal_path(part)})

    def lock_path(self, part: WorkerPart) -> Path:
        """Return the path of the lock that the worker with this part holds while it writes."""
        return self.directory / f"lock{_suffix(part)}"


def _suffix(part: WorkerPart) -> str:
    return f"-{part.index}" if part.index else ""


@dataclass(frozen=True)
class Job:
    """One model, a directory or a pair, and the benchmarks to score it on, in order.

    A worker with a part of several answers its chunks and reports nothing. `evaluations` may be at work on its device
    at once, see evaluation.answers.devices; it changes no answer, and is no part of an assignment.
    """

    model: Path | LogitsExtrapolation
    device: str
    dtype: str
    batch_size: int
    limit: int | None
    assignments: tuple[Assignment, ...]
    backend: Backend = HF
    part: WorkerPart = WHOLE
    evaluations: int | None = None

    def to_line(self) -> bytes:
        """Return the job as one line of JSON."""
        return json.dumps(dataclasses.asdict(self), default=str).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Return the job that `to_line` wrote."""
        fields = json.loads(line)
        model = fields.pop("model")
        return cls(
            Path(model)
            if isinstance(model, str)
            else LogitsExtrapolation(Path(model["start"]), Path(model["end"]), model["alpha"]),
            assignments=tuple(Assignment(**each) for each in fields.pop("assignments")),
            backend=Backend(**fields.pop("backend")),
            part=WorkerPart(**fields.pop("part")),
            **fields,
        )
