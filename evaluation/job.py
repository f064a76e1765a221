"""Job: what the parent asks of one worker process, as the line of JSON that crosses the pipe."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evaluation.digest import digest_value
from evaluation.fingerprint import LogitsExtrapolation
from evaluation.report import Setting


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
        """Return the directory of this evaluation: its journal, its lock, its log and at last a report a limit.

        Every limit has the same directory: what the first problems were answered is what they are answered again.
        """
        key = digest_value([self.model_digest, self.benchmark_digest, {**self.settings, "limit": None}])
        return Path(self.cache) / f"{self.benchmark}-{key[:24]}"

    @property
    def report_path(self) -> Path:
        """Return the path of the report, which is complete or absent."""
        return self.directory / f"report{self._part}.json"

    @property
    def results_path(self) -> Path:
        """Return the path of lm-eval's own results, complete or absent."""
        return self.directory / f"results{self._part}.json"

    @property
    def samples_path(self) -> Path:
        """Return the path of lm-eval's own samples, complete or absent."""
        return self.directory / f"samples{self._part}.jsonl"

    @property
    def complete(self) -> bool:
        """Return whether the report and what it was made of are there."""
        return all(path.exists() for path in (self.report_path, self.results_path, self.samples_path))

    @property
    def _part(self) -> str:
        limit = self.settings.get("limit")
        return "" if limit is None else f"-first-{limit}"

    @property
    def journal_path(self) -> Path:
        """Return the path of the journal of answers."""
        return self.directory / "journal.jsonl"


@dataclass(frozen=True)
class Job:
    """One model, a directory or a pair, and the benchmarks to score it on, in order."""

    model: Path | LogitsExtrapolation
    device: str
    dtype: str
    batch_size: int
    limit: int | None
    assignments: tuple[Assignment, ...]

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
            **fields,
        )
