"""Harness: scores a model on benchmarks, in child processes of their own, resuming what was interrupted."""

import logging
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.answers.backend import BATCH_SIZES, Backend, parse_backend
from evaluation.answers.devices import NO_WEIGHTS, device_kind, worker_devices
from evaluation.answers.fingerprint import Fingerprint, LogitsExtrapolation, fingerprint
from evaluation.answers.job import Assignment, Job, WorkerPart
from evaluation.benchmarks.benchmark import Benchmark, resolve_benchmark
from evaluation.child import ChildJob, last_log_line, run_children
from evaluation.errors import BackendError, BenchmarkError, DeviceError, ModelError, WorkerError
from evaluation.verdict.report import Evaluated, Report, Setting

# A version of any of these can change a score.
LIBRARIES = ("antlr4-python3-runtime", "lm_eval", "math-verify", "sympy", "torch", "transformers")
log = logging.getLogger(__name__)

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Progress:
    """How far one benchmark is, counted in answers; answers kept from an earlier run count as done.

    `generated` of the answers, with `tokens` in all, took `seconds` in the model now, workers at once counting once.
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


def evaluate(
    model: Path | LogitsExtrapolation,
    benchmarks: Sequence[str | Path],
    *,
    cache: Path,
    device: str = "cpu",
    dtype: str = "auto",
    batch_size: int | None = None,
    limit: int | None = None,
    backend: str = "hf",
    evaluations: int | None = None,
    details: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> list[Evaluated]:
    """Return one evaluation a benchmark, in their order, scoring in child processes what `cache` does not hold yet.

    A model is a directory, or two that answer as one. A benchmark is a shipped name or the path of an lm-eval task
    YAML. Reports are keyed by the content of model and benchmark and by the settings, so asking again costs nothing;
    after a kill at any moment the same call goes on from the last finished batch and ends in the same report. dtype
    "auto" is the dtype the model is stored in. `limit` scores the first problems only; limits share their answers, all
    of them where limit times repeats is a multiple of batch_size.

    A report is enough, unless `details` are asked for: then a cache that has lost lm-eval's results or samples, or
    never had them, makes them from its journal.

    `device` is cpu, cuda, cuda:N, or several with commas between: then each has a worker, batches are dealt out to them
    in turn, and the report is that of one worker. Any number of workers goes on with what any other has answered.
    `backend` is hf or vllm, see evaluation.answers.backend; batch_size is its default where it is None.
    `evaluations` may be at work on a device at once, see evaluation.answers.devices: one on a GPU and any number on the
    CPU where it is None. Raises EvaluationError, see evaluation.errors.
    """
    job = _job(
        model,
        benchmarks,
        cache=cache,
        device=device,
        dtype=dtype,
        batch_size=batch_size,
        limit=limit,
        backend=parse_backend(backend),
        evaluations=evaluations,
    )
    missing = tuple(
        assignment
        for assignment in job.assignments
        if not (assignment.complete if details else assignment.report_path.exists())
    )
    if missing:
        _run_workers(replace(job, assignments=missing), on_progress)
    return [
        Evaluated(
            # The content decides, but the path in a report from the cache may be that of a copy.
            replace(Report.read(assignment.report_path), model=str(job.model)),
            assignment.results_path,
            assignment.samples_path,
        )
        for assignment in job.assignments
    ]


def _job(
    model: Path | LogitsExtrapolation,
    benchmarks: Sequence[str | Path],
    *,
    cache: Path,
    device: str,
    dtype: str,
    batch_size: int | None,
    limit: int | None,
    backend: Backend,
    evaluations: int | None,
) -> Job:
    if evaluations is not None and evaluations < 1:
        raise DeviceError(f"evaluations is {evaluations} and must be at least 1.")
    size = BATCH_SIZES[backend.name] if batch_size is None else batch_size
    subject = fingerprint(model)
    resolved = [resolve_benchmark(benchmark) for benchmark in benchmarks]
    worker_devices(device, backend)
    if isinstance(model, LogitsExtrapolation) and backend.name != "hf":
        raise BackendError(f"backend {backend.name} does not decode two models in lock-step: pass hf.")
    settings = {
        **_settings(subject, device=device, dtype=dtype, batch_size=size, limit=limit),
        **backend.settings(),
    }
    return Job(
        model=subject.model,
        device=device,
        dtype=str(settings["dtype"]),
        batch_size=size,
        limit=limit,
        assignments=tuple(_assignment(subject, benchmark, settings, cache) for benchmark in resolved),
        backend=backend,
        evaluations=evaluations,
    )


def _settings(
    subject: Fingerprint, *, device: str, dtype: str, batch_size: int, limit: int | None
) -> dict[str, Setting]:
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
        "device": device_kind(device),
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


def _run_workers(job: Job, on_progress: Callable[[Progress], None] | None) -> None:
    devices = worker_devices(job.device, job.backend)
    jobs = [replace(job, device=each, part=WorkerPart(number, len(devices))) for number, each in enumerate(devices)]
    _run(jobs, _Workers(on_progress))
    if len(jobs) > 1:
        # What all of them wrote is scored by one more, which needs no weights.
        _run([replace(job, device=NO_WEIGHTS)], lambda _, __: None)


def _run(jobs: Sequence[Job], on_event: Callable[[int, Mapping[str, Any]], None]) -> None:
    directory = jobs[0].assignments[0].directory
    children = [
        ChildJob(
            job.to_line(),
            directory / (f"worker-{job.part.index}.log" if job.part.index else "worker.log"),
            device=job.device,
        )
        for job in jobs
    ]
    # An engine on a CPU has no way to give up its memory.
    codes = run_children(
        "evaluation.answers.worker",
        children,
        on_event=on_event,
        keep=jobs[0].backend.name == "hf" or device_kind(jobs[0].device) == "cuda",
    )
    for job, child, code in zip(jobs, children, codes, strict=True):
        if code != 0:
            raise WorkerError(_failure(job, code, child.log_path))


class _Workers:
    """The progress of several workers, added up: the last of each on each benchmark."""

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self._on_progress = on_progress
        self._last: dict[str, dict[int, Progress]] = {}

    def __call__(self, number: int, event: Mapping[str, Any]) -> None:
        if event["event"] == "waiting":
            log.warning(
                "%s has %d evaluation%s at work and may have no more: waiting for one to end. More evaluations at once,"
                " or share_device=true, would not wait.",
                event["device"],
                event["evaluations"],
                "" if event["evaluations"] == 1 else "s",
            )
        elif self._on_progress is not None:
            progress = Progress(**{name: value for name, value in event.items() if name != "event"})
            of_all = self._last.setdefault(progress.benchmark, {})
            of_all[number] = progress
            self._on_progress(
                replace(
                    progress,
                    done=sum(each.done for each in of_all.values()),
                    generated=sum(each.generated for each in of_all.values()),
                    tokens=sum(each.tokens for each in of_all.values()),
                    seconds=max(each.seconds for each in of_all.values()),
                )
            )


def _failure(job: Job, code: int, log_path: Path) -> str:
    names = ", ".join(assignment.benchmark for assignment in job.assignments)
    if code < 0:
        return (
            f"the process scoring {job.model} on {names} was killed by {signal.Signals(-code).name}; "
            "finished answers are kept, evaluate again to go on. If memory ran out, pass a smaller batch size."
        )
    return (
        f"the process scoring {job.model} on {names} failed with exit code {code}: {last_log_line(log_path)} "
        f"(more in {log_path})"
    )
