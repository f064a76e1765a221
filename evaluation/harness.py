"""Harness: scores a model on benchmarks, in a child process of its own, resuming what was interrupted."""

import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.benchmark import Benchmark, resolve_benchmark
from evaluation.child import last_words, run_child
from evaluation.errors import BenchmarkError, DeviceError, ModelError, WorkerError
from evaluation.fingerprint import Fingerprint, LogitsExtrapolation, fingerprint
from evaluation.job import Assignment, Job
from evaluation.report import Report, Setting

# A version of any of these can change a score.
LIBRARIES = ("antlr4-python3-runtime", "lm_eval", "math-verify", "torch", "transformers")
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Progress:
    """How far one benchmark is, counted in answers; answers kept from an earlier run count as done.

    `generated` of the answers, with `tokens` in all, took `seconds` in the model now.
    """

    benchmark: str
    done: int
    total: int
    generated: int = 0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def remaining(self) -> float | None:
        """Return the seconds that the missing answers will take at the pace so far, None when there is none yet."""
        return (self.total - self.done) * self.seconds / self.generated if self.generated else None

    @property
    def pace(self) -> str:
        """Return answers and tokens a second in words, empty while nothing was generated."""
        if not self.seconds:
            return ""
        tokens = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.tokens else ""
        return f"{self.generated / self.seconds:,.1f} answers/s{tokens}"


@dataclass(frozen=True)
class Evaluated:
    """A report and where lm-eval's own results (JSON) and samples (JSONL) lie that it was made of."""

    report: Report
    results: Path
    samples: Path


def evaluate(
    model: Path | LogitsExtrapolation,
    benchmarks: Sequence[str | Path],
    *,
    cache: Path,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int = 64,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Report]:
    """Return one report a benchmark, in their order, scoring in one child process whatever `cache` does not hold yet.

    A model is a directory, or two that answer as one. A benchmark is a shipped name or the path of an lm-eval task
    YAML. Reports are keyed by the content of model and benchmark and by the settings, so asking again costs nothing;
    after a kill at any moment the same call goes on from the last finished batch and ends in the same report. dtype
    "auto" is the dtype the model is stored in. `limit` scores the first problems only; limits share their answers, all
    of them where limit times repeats is a multiple of batch_size. Raises EvaluationError, see evaluation.errors.
    """
    job = _job(model, benchmarks, cache=cache, device=device, dtype=dtype, batch_size=batch_size, limit=limit)
    missing = tuple(assignment for assignment in job.assignments if not assignment.report_path.exists())
    return [each.report for each in _finish(job, missing, on_progress)]


def evaluate_in_detail(
    model: Path | LogitsExtrapolation,
    benchmarks: Sequence[str | Path],
    *,
    cache: Path,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int = 64,
    limit: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Evaluated]:
    """Return what `evaluate` does, with lm-eval's results and samples, which an older cache makes from its journal."""
    job = _job(model, benchmarks, cache=cache, device=device, dtype=dtype, batch_size=batch_size, limit=limit)
    missing = tuple(assignment for assignment in job.assignments if not assignment.complete)
    return _finish(job, missing, on_progress)


def _job(
    model: Path | LogitsExtrapolation,
    benchmarks: Sequence[str | Path],
    *,
    cache: Path,
    device: str,
    dtype: str,
    batch_size: int,
    limit: int | None,
) -> Job:
    subject = fingerprint(model)
    resolved = [resolve_benchmark(benchmark) for benchmark in benchmarks]
    settings = _settings(subject, device=device, dtype=dtype, batch_size=batch_size, limit=limit)
    return Job(
        model=subject.model,
        device=device,
        dtype=str(settings["dtype"]),
        batch_size=batch_size,
        limit=limit,
        assignments=tuple(_assignment(subject, benchmark, settings, cache) for benchmark in resolved),
    )


def _finish(
    job: Job, missing: tuple[Assignment, ...], on_progress: Callable[[Progress], None] | None
) -> list[Evaluated]:
    if missing:
        _run_worker(replace(job, assignments=missing), on_progress)
    return [
        Evaluated(
            # The content decides, but the path in a report from the cache may be that of a copy.
            replace(Report.read(assignment.report_path), model=str(job.model)),
            assignment.results_path,
            assignment.samples_path,
        )
        for assignment in job.assignments
    ]


def _settings(
    subject: Fingerprint, *, device: str, dtype: str, batch_size: int, limit: int | None
) -> dict[str, Setting]:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise DeviceError(f"device is {device} and must be cpu, cuda or cuda:N.")
    if dtype == "auto" and subject.dtype is None:
        raise ModelError(f"{subject.model}: config.json states no dtype: pass dtype, one of {', '.join(DTYPES)}.")
    chosen = subject.dtype if dtype == "auto" else dtype
    if chosen not in DTYPES:
        raise ModelError(f"dtype of {subject.model} is {chosen} and must be one of {', '.join(DTYPES)}: pass dtype.")
    for name, value in (("batch_size", batch_size), ("limit", 1 if limit is None else limit)):
        if value < 1:
            raise BenchmarkError(f"{name} is {value} and must be at least 1.")
    return {
        "add_special_tokens": True,
        "batch_size": batch_size,
        "device": device,
        "dtype": chosen,
        "limit": limit,
        **{f"{library} version": version(library) for library in LIBRARIES},
    }


def _assignment(subject: Fingerprint, benchmark: Benchmark, settings: Mapping[str, Setting], cache: Path) -> Assignment:
    assignment = Assignment(
        benchmark=benchmark.name,
        benchmark_path=str(benchmark.path),
        benchmark_digest=benchmark.digest,
        model_digest=subject.digest,
        settings={**settings, **benchmark.generation},
        cache=str(cache.absolute()),
    )
    assignment.directory.mkdir(parents=True, exist_ok=True)
    return assignment


def _run_worker(job: Job, on_progress: Callable[[Progress], None] | None) -> None:
    log_path = job.assignments[0].directory / "worker.log"

    def tell(event: Mapping[str, Any]) -> None:
        if on_progress is not None:
            on_progress(Progress(**{name: value for name, value in event.items() if name != "event"}))

    code = run_child("evaluation.worker", job.to_line(), log_path=log_path, on_event=tell)
    if code != 0:
        raise WorkerError(_obituary(job, code, log_path))


def _obituary(job: Job, code: int, log_path: Path) -> str:
    names = ", ".join(assignment.benchmark for assignment in job.assignments)
    if code < 0:
        return (
            f"the process scoring {job.model} on {names} was killed by {signal.Signals(-code).name}; "
            "finished answers are kept, evaluate again to go on. If memory ran out, pass a smaller batch size."
        )
    return (
        f"the process scoring {job.model} on {names} failed with exit code {code}: {last_words(log_path)} "
        f"(more in {log_path})"
    )
