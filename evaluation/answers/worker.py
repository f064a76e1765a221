"""Worker: the child process that scores one model, `python -m evaluation.answers.worker`.

It reads jobs from its standard input, reports progress as JSON lines on its standard output, and leaves a report a
benchmark. During a job it holds a lock on each evaluation, so two workers never write one journal, and a place on its
devices; after it nothing of the model is left. It does not outlive its parent. Of several workers each answers its part
of the chunks; one more, without weights, then scores what they left in their journals.
"""

import gc
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from evaluation.answers.details import BOOTSTRAPS, write_details
from evaluation.answers.devices import MASK, NO_WEIGHTS, cuda_index, device_kind, mask, occupied
from evaluation.answers.divergence import DivergenceJob, measure
from evaluation.answers.fingerprint import LogitsExtrapolation
from evaluation.answers.job import AnsweredPart, Assignment, Job
from evaluation.answers.journal import Journal
from evaluation.benchmarks.lm_eval_task import load_any_task
from evaluation.child import Send, run_as_child
from evaluation.errors import BenchmarkError, DeviceError, EvaluationError, ModelError
from evaluation.problems import problem_id
from evaluation.verdict.report import Report

if TYPE_CHECKING:
    from evaluation.answers.lm import JournalledLM

FEWSHOT_SEED = 1234
# Before a job hides devices from this process: places are those of the whole machine.
ENVIRONMENT = dict(os.environ)
# Heavy ones that stay, other than what a job makes with them.
MODULES = ("lm_eval.evaluator", "evaluation.answers.lm")


def main() -> None:
    """Do the jobs on standard input."""
    run_as_child(_work)


def _work(line: bytes, send: Send, more: bool) -> None:
    content = json.loads(line)
    if "divergence" in content:
        _diverge(DivergenceJob(**content["divergence"]), send)
    else:
        run(Job.from_line(line), send, kept=more)


def _diverge(job: DivergenceJob, send: Send) -> None:
    if device_kind(job.device) == "cuda":
        _see_only(job.device)

    def on_wait(name: str) -> None:
        send({"event": "waiting", "device": name, "evaluations": job.evaluations or 1})

    device = "cuda" if device_kind(job.device) == "cuda" else job.device
    with occupied(job.device, ENVIRONMENT, evaluations=job.evaluations, on_wait=on_wait):
        send({"event": "measured", **asdict(measure(replace(job, device=device)))})
        _free_memory()


def run(job: Job, send: Send, *, kept: bool = False) -> None:
    """Score every assignment that has no report yet, loading the model once; `send` gets an event for each chunk.

    A process that is `kept` for other jobs keeps an engine that another model may be loaded into.
    """
    with ExitStack() as locks:
        # In one order for everybody: two jobs with the same benchmarks cannot wait for each other.
        for path in sorted({assignment.lock_path(job.part) for assignment in job.assignments}):
            locks.enter_context(FileLock(path))
        pending = [assignment for assignment in job.assignments if not assignment.complete]
        if not pending:
            return
        if device_kind(job.device) == "cuda":
            _see_only(job.device)
        # After those of the evaluation: who has a place waits for nobody.
        locks.enter_context(_place(job, send))
        refusal = None
        try:
            _score_all(job, pending, send, kept=kept)
        except EvaluationError as error:
            # Without its frames, which hold the model.
            refusal = type(error)(str(error))
        # As long as the place is held.
        _free_memory()
        if refusal is not None:
            raise refusal


def _score_all(job: Job, pending: Sequence[Assignment], send: Send, *, kept: bool) -> None:
    # Collecting garbage among the modules that torch and transformers leave behind costs a fifth of the start.
    gc.disable()
    for module in MODULES:
        import_module(module)
    gc.freeze()
    # Tasks first: a broken one is refused before minutes go into a large model.
    tasks = [load_task(assignment) for assignment in pending]
    lm = _load_lm(job, kept=kept)
    gc.enable()
    try:
        _score_each(job, pending, tasks, lm, send)
    finally:
        lm.release()


def _score_each(job: Job, pending: Sequence[Assignment], tasks: Sequence[Any], lm: "JournalledLM", send: Send) -> None:
    for assignment, task in zip(pending, tasks, strict=True):
        with Journal(assignment.journal_path(job.part), assignment.other_journals(job.part)) as journal:
            lm.keep(journal, partial(_report_progress, send, lm, assignment.benchmark), job.part)
            try:
                report, results = score(
                    lm, task, assignment=assignment, model=str(job.model), limit=job.limit, journal=journal
                )
            except AnsweredPart:
                continue
        # Last the report, which says that the evaluation is done.
        write_details(results, report=report, lm=lm, assignment=assignment)
        report.write(assignment.report_path)


def _free_memory() -> None:
    # Two models in lock-step know each other.
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def score(
    lm: "JournalledLM", task: Any, *, assignment: Assignment, model: str, limit: int | None, journal: Journal
) -> tuple[Report, dict[str, Any]]:
    """Return the report of `lm` on a task by its first metric, and lm-eval's own results, samples included.

    Raises BenchmarkError when the metric scores no single problem, ModelError when the chat template is missing.
    """
    from lm_eval.evaluator import evaluate

    metric = next(iter(task.aggregation()))
    templated = bool((task.get_config("metadata") or {}).get("chat_template"))
    if templated and lm.tokenizer.chat_template is None:
        raise ModelError(
            f"{model} brings no chat template for {assignment.benchmark}: score it without @chat, "
            "in the benchmark's own format."
        )
    results = evaluate(
        lm=lm,
        apply_chat_template=templated,
        task_dict={"tasks": {assignment.benchmark: task}},
        limit=limit,
        bootstrap_iters=BOOTSTRAPS,
        log_samples=True,
    )
    samples = results["samples"][assignment.benchmark]
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    rates = {name: _mean_rate(samples, name) for name in samples[0]["metrics"] if name != metric}
    if task.OUTPUT_TYPE == "generate_until":
        rates["truncated"] = sum(lm.truncated) / len(lm.truncated)
    report = Report(
        model=model,
        model_digest=assignment.model_digest,
        benchmark=assignment.benchmark,
        benchmark_digest=assignment.benchmark_digest,
        metric=metric,
        scores=tuple((problem_id(sample["doc"]), _number(sample, metric)) for sample in samples),
        rates={name: rate for name, rate in rates.items() if rate is not None},
        settings=assignment.settings,
        seconds=journal.seconds,
    )
    return report, results


def load_task(assignment: Assignment) -> Any:  # lm_eval's Task
    """Return the lm-eval task of a benchmark; BenchmarkError when it cannot be loaded or its first metric is a loss."""
    task = load_any_task(assignment.benchmark, assignment.benchmark_path)
    metric = next(iter(task.aggregation()))
    if not task.higher_is_better().get(metric, True):
        raise BenchmarkError(
            f"{assignment.benchmark} scores by {metric}, where lower is better: name another metric first."
        )
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    return task


def _load_lm(job: Job, *, kept: bool) -> "JournalledLM":
    device = "cuda" if device_kind(job.device) == "cuda" else job.device
    settings: dict[str, Any] = {"device": device, "dtype": job.dtype, "batch_size": job.batch_size}
    if isinstance(job.model, LogitsExtrapolation):
        from evaluation.answers.logits_extrapolation import LogitsExtrapolationLM

        return LogitsExtrapolationLM(job.model, **settings)
    settings["max_length"] = job.backend.max_model_len
    if job.backend.name == "vllm" and device != NO_WEIGHTS:
        from evaluation.answers.vllm_engine import EngineLM

        return EngineLM(job.model, **settings, backend=job.backend, digest=job.assignments[0].model_digest, kept=kept)
    from evaluation.answers.lm import JournalledLM

    return JournalledLM(job.model, **settings)


@cache
def _see_only(device: str) -> None:
    """Have this process and those of vLLM see no other GPU; DeviceError for one that is not there.

    Once, while nothing has touched a GPU yet.
    """
    import torch

    count = torch.cuda.device_count()
    for name in device.split(","):
        if cuda_index(name) >= count:
            raise DeviceError(
                f"device {name} was asked for and this machine has {count} CUDA devices: pass device cpu."
            )
    os.environ[MASK] = mask(device, ENVIRONMENT)


@contextmanager
def _place(job: Job, send: Send) -> Iterator[None]:
    def on_wait(name: str) -> None:
        send({"event": "waiting", "device": name, "evaluations": job.evaluations or 1})

    with ExitStack() as places:
        if not job.backend.share_device:
            places.enter_context(occupied(job.device, ENVIRONMENT, evaluations=job.evaluations, on_wait=on_wait))
        yield


def _number(sample: Mapping[str, Any], metric: str) -> float:
    value = sample[metric]
    if not isinstance(value, (int, float)):
        raise BenchmarkError(f"metric {metric} has no score per problem but {value!r}: name another metric first.")
    return float(value)


def _mean_rate(samples: list[dict[str, Any]], name: str) -> float | None:
    values = [sample[name] for sample in samples]
    if not all(isinstance(value, (int, float)) and 0 <= value <= 1 for value in values):
        return None
    return float(sum(values) / len(values))


def _report_progress(send: Send, lm: "JournalledLM", benchmark: str, done: int, total: int) -> None:
    spent = {"generated": lm.spent.answers, "tokens": lm.spent.tokens, "seconds": lm.spent.seconds}
    send({"event": "progress", "benchmark": benchmark, "done": done, "total": total, **spent})


if __name__ == "__main__":
    main()
