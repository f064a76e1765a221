"""Divergence: how far models have gone from their base on the tokens of prompts, which no training rewards.

KL(model ‖ base) of the distributions of the next token, in nats: the sum over the vocabulary of p_model (log p_model -
log p_base), taken after each token of a prompt, the last included, and averaged over all tokens of all prompts, each
counting as much. Prompts are those that the benchmark puts, cut to their first LONGEST tokens, of its first PROMPTS
problems; nothing is generated, so all models are asked about the same text. Log-softmax is taken in fp32.

What it costs is bounded by these two numbers: one pass over at most 65,536 tokens a model. It needs two models in
memory at once, through transformers whatever the backend, and is therefore made only for who asks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.answers.fingerprint import fingerprint
from evaluation.benchmarks.benchmark import resolve_benchmark
from evaluation.child import ChildJob, last_log_line, run_children
from evaluation.digest import digest_value
from evaluation.errors import BenchmarkError, ModelError, WorkerError
from evaluation.files import write_file

PROMPTS = 64
LONGEST = 1024
# Tokens whose distributions are in memory in fp32 at once.
_ROWS = 128


@dataclass(frozen=True)
class Divergence:
    """Nats a token of each model from the base, on so many prompts of a benchmark with so many tokens."""

    benchmark: str
    prompts: int
    tokens: int
    nats: tuple[float, ...]


@dataclass(frozen=True)
class DivergenceJob:
    """What a worker is asked: models against `base`, both on one device in one dtype."""

    base: str
    models: tuple[str, ...]
    benchmark: str
    benchmark_path: str
    device: str
    dtype: str
    evaluations: int | None = None


def divergence(
    models: Sequence[Path],
    base: Path,
    benchmark: str,
    *,
    cache: Path,
    device: str = "cpu",
    dtype: str = "auto",
    evaluations: int | None = None,
) -> Divergence:
    """Return how far each model is from `base` on a benchmark's prompts, from `cache` where it was measured before.

    It is computed in a child process, on the first of several devices. dtype "auto" is the base's. Raises
    EvaluationError, see evaluation.errors: ModelError for a vocabulary of another size.
    """
    subject, resolved = fingerprint(base), resolve_benchmark(benchmark)
    chosen = subject.dtype if dtype == "auto" else dtype
    if chosen is None:
        raise ModelError(f"{base}: config.json states no dtype: pass dtype.")
    digests = [subject.digest, *(fingerprint(model).digest for model in models)]
    libraries = [version(library) for library in ("lm_eval", "torch", "transformers")]
    key = digest_value([digests, resolved.digest, chosen, PROMPTS, LONGEST, libraries])[:24]
    cache.mkdir(parents=True, exist_ok=True)
    path, log_path = (cache / f"divergence-{key}.{suffix}" for suffix in ("json", "log"))
    if not path.exists():
        job = DivergenceJob(
            base=str(base.absolute()),
            models=tuple(str(model.absolute()) for model in models),
            benchmark=resolved.name,
            benchmark_path=str(resolved.path),
            device=device.split(",", maxsplit=1)[0],
            dtype=chosen,
            evaluations=evaluations,
        )
        write_file(path, json.dumps(_measured(job, log_path)))
    content = json.loads(path.read_text(encoding="utf-8"))
    return Divergence(resolved.name, content["prompts"], content["tokens"], tuple(content["nats"]))


def _measured(job: DivergenceJob, log_path: Path) -> dict[str, Any]:
    measured: dict[str, Any] = {}

    def on_event(_: int, event: Mapping[str, Any]) -> None:
        if event["event"] == "measured":
            measured.update(event)

    child = ChildJob(json.dumps({"divergence": asdict(job)}).encode(), log_path, device=job.device)
    (code,) = run_children("evaluation.answers.worker", [child], on_event=on_event)
    if code != 0 or not measured:
        raise WorkerError(
            f"the process measuring {', '.join(job.models)} against {job.base} ended with status {code}:"
            f" {last_log_line(log_path)} (more in {log_path})"
        )
    return measured


def measure(job: DivergenceJob) -> Divergence:
    """Measure in this process; both models are on job.device while a model is measured."""
    import torch

    from evaluation.answers.lm import JournalledLM

    load = partial(JournalledLM, device=job.device, dtype=job.dtype, batch_size=1)
    base = load(Path(job.base))
    texts = _prompts(job, base)
    rows = [base._encode([text])["input_ids"][0][: min(LONGEST, base.max_length)] for text in texts]
    nats = []
    for path in job.models:
        model = load(Path(path))
        if model.vocab_size != base.vocab_size:
            raise ModelError(
                f"{path} has {model.vocab_size} tokens in its vocabulary and {job.base} {base.vocab_size}: their"
                " distributions cannot be compared, set divergence: false."
            )
        with torch.inference_mode():
            sums = [_summed(model.model, base.model, torch.tensor([row], device=job.device)) for row in rows]
        nats.append(sum(sums) / sum(map(len, rows)))
        del model
    return Divergence(job.benchmark, len(rows), sum(map(len, rows)), tuple(nats))


def _prompts(job: DivergenceJob, lm: Any) -> list[str]:
    from evaluation.benchmarks.lm_eval_task import load_any_task

    task = load_any_task(job.benchmark, job.benchmark_path)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    templated = bool((task.get_config("metadata") or {}).get("chat_template"))
    task.build_all_requests(
        limit=PROMPTS,
        rank=0,
        world_size=1,
        apply_chat_template=templated,
        chat_template=lm.apply_chat_template if templated else None,
        tokenizer_name=lm.tokenizer_name if templated else "",
    )
    # A problem with several choices, or several samples, puts one prompt.
    texts = {request.doc_id: str(request.args[0]) for request in task.instances}
    prompts = [text for text in texts.values() if text]
    if not prompts:
        raise BenchmarkError(f"{job.benchmark} puts no prompt to measure on: set divergence: false.")
    return prompts


def _summed(model: Any, base: Any, tokens_1T: Any) -> float:
    """Return the sum of the divergences after each of the tokens."""
    ours_TV, theirs_TV = (each(input_ids=tokens_1T).logits[0] for each in (model, base))
    total = 0.0
    for ours, theirs in zip(ours_TV.split(_ROWS), theirs_TV.split(_ROWS), strict=True):
        log_p, log_q = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total
