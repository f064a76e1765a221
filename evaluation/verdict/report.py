"""Report: how one model did on one benchmark, problem by problem."""

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeAlias

from evaluation.errors import ReportError
from evaluation.files import write_file

Setting: TypeAlias = str | int | float | bool | None


@dataclass(frozen=True)
class Report:
    """Scores of one model on one benchmark; two reports are equal when they differ in nothing but the time spent.

    `scores` holds (problem id, mean score over repeats) in the benchmark's order; an id is the sha256 of the problem.
    `rates` are shares of all answers in 0..1, such as `truncated` (cut off by the token limit) and `answered`.
    `seconds` is the time spent in the model, over all the processes it took.
    """

    model: str
    model_digest: str
    benchmark: str
    benchmark_digest: str
    metric: str
    scores: tuple[tuple[str, float], ...]
    rates: Mapping[str, float]
    settings: Mapping[str, Setting]
    seconds: float = field(compare=False)

    @property
    def n(self) -> int:
        """Return the number of problems."""
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        """Return the mean score over the problems."""
        return math.fsum(score for _, score in self.scores) / self.n

    @property
    def standard_error(self) -> float:
        """Return the standard error of the accuracy over problems, repeats averaged; nan for one problem."""
        if self.n < 2:
            return math.nan
        return statistics.stdev(score for _, score in self.scores) / math.sqrt(self.n)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the two-sided 95 % interval of the accuracy: Wilson for scores 0/1, bootstrap over problems else."""
        # A second to import, and most readers of a report want no interval.
        from evaluation.verdict.bounds import mean_interval

        return mean_interval([score for _, score in self.scores])

    @property
    def sentence(self) -> str:
        """Return the accuracy and the time it took: 155/400 = 0.388, 7 s."""
        total = math.fsum(score for _, score in self.scores)
        counted = f"{total:.0f}/{self.n}" if total.is_integer() else f"{total:.2f}/{self.n}"
        seconds = f"{self.seconds:.0f}" if self.seconds >= 1 else f"{self.seconds:.1f}"
        return f"{counted} = {self.accuracy:.3f}, {seconds} s"

    def to_json(self) -> str:
        """Return the report as JSON that `from_json` reads back to an equal report."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the report that `to_json` wrote; ReportError when the text is anything else."""
        try:
            fields = json.loads(text)
            scores = tuple((str(problem), float(score)) for problem, score in fields.pop("scores"))
            return cls(scores=scores, **fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ReportError(f"not a report: {error}. Delete it and evaluate again.") from error

    def write(self, path: Path) -> None:
        """Write the report so that `path` is complete or absent, even after a power cut."""
        write_file(path, self.to_json())

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the report at `path`; ReportError naming the path when it is missing or none."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, ReportError) as error:
            raise ReportError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Evaluated:
    """A report, and where lm-eval's own results (JSON) and samples (JSONL) lie that it was made of, if kept."""

    report: Report
    results: Path
    samples: Path
