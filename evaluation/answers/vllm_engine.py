"""vLLM engine: a model answered for by vLLM (https://docs.vllm.ai), chunk by chunk, in this process.

Around the engine everything is as for transformers: how a prompt becomes tokens, where an answer ends, what is
truncated and what the journal keeps.

In a process that is kept for other models the engine sleeps between them: it gives up its weights and its cache, and so
the place on its GPUs, and takes the next model's weights when it has a place again. They are its own only when a canary
says so, the log-probabilities of one text; else, and for a model of another shape, the job goes to another process.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from evaluation.answers.backend import RUNNING, Backend
from evaluation.answers.devices import NO_WEIGHTS, device_kind
from evaluation.answers.fingerprint import TOKENIZER
from evaluation.answers.lm import CUT, JournalledLM, load
from evaluation.child import HandedBack
from evaluation.errors import BenchmarkError, DeviceError, ModelError, WorkerError

ENVIRONMENT = {
    # The engine in this process dies with it, and schedules the same requests the same way each time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
# What an engine has read once, and keeps whatever weights it is given.
SHAPE = ("config.json", *TOKENIZER)
CANARY = "1 + 2 = 3, 12 + 34 = 46, 5 = 5"
# How far the log-probabilities of the canary may be from those of transformers on the CPU, in nats, their mean.
CANARY_TOLERANCE = {"float32": 0.01, "float16": 0.1, "bfloat16": 0.25}


@dataclass
class _Asleep:
    """An engine without weights, what it was started with, and what it said of the canary with its last weights."""

    engine: Any  # vllm.LLM
    arguments: dict[str, Any]
    shape: dict[str, bytes]
    digest: str
    canary: list[float]


# There is one engine a process.
_asleep: list[_Asleep] = []


class EngineLM(JournalledLM):
    """A model whose answers come from vLLM; the engine starts with the first answer that no journal holds.

    A sampled answer has a seed of its own, drawn from its chunk's: it depends on no other chunk, and repeats differ.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str,
        dtype: str,
        batch_size: int,
        max_length: int | None,
        backend: Backend,
        digest: str = "",
        kept: bool = False,
    ) -> None:
        """Read configuration and tokenizer; the weights, which `digest` names, are vLLM's to load.

        A process that is `kept` keeps the engine.
        """
        super().__init__(path, device=NO_WEIGHTS, dtype=dtype, batch_size=batch_size, max_length=max_length)
        self._can_answer = True
        # vLLM takes one token more than it is asked for likelihoods of.
        self._likelihood_room = 1
        self._path, self._dtype, self._digest, self._kept = path, dtype, digest, kept
        self._arguments = {
            "dtype": dtype,
            "load_format": "safetensors",
            "trust_remote_code": False,
            # The checkpoint's sampling settings must not leak into a benchmark's.
            "generation_config": "vllm",
            "max_model_len": self.max_length,
            "max_num_seqs": min(RUNNING, batch_size),
            "tensor_parallel_size": backend.tensor_parallel_size,
            "gpu_memory_utilization": backend.gpu_memory_utilization,
            **({"enable_sleep_mode": True} if kept else {}),
        }
        self._kind = device_kind(device)

    @cached_property
    def _engine(self) -> Any:  # vllm.LLM
        os.environ.update(ENVIRONMENT)
        from vllm import LLM
        from vllm.platforms import current_platform

        if current_platform.device_type != self._kind:
            raise DeviceError(
                f"device is {self._kind} and this vLLM runs on {current_platform.device_type}: pass that as device."
            )
        if _asleep:
            return self._woken(_asleep[0])
        try:
            return LLM(model=str(self._path), **self._arguments)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            raise ModelError(f"vLLM cannot load {self._path}: {' '.join(str(error).split())}") from error

    def _woken(self, asleep: _Asleep) -> Any:  # vllm.LLM
        """Return the engine of an earlier model with the weights of this one; HandedBack where it cannot have them."""
        if (asleep.arguments, asleep.shape) != (self._arguments, self._shape):
            raise HandedBack
        engine = asleep.engine
        engine.wake_up(tags=["weights"])
        try:
            # From a path of one's choice since 0.15; before that the engine knows its first model alone.
            engine.collective_rpc("reload_weights", kwargs={"weights_path": str(self._path)})
        except (AttributeError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
            raise HandedBack from error
        engine.wake_up(tags=["kv_cache"])
        said, expected = self._canary(engine), self._expected_canary()
        apart = statistics.fmean(abs(ours - theirs) for ours, theirs in zip(said, expected, strict=True))
        stale = said == asleep.canary and self._digest != asleep.digest
        # Written so that what is no number is no agreement.
        if stale or not apart <= CANARY_TOLERANCE[self._dtype]:
            raise HandedBack
        return engine

    def release(self) -> None:
        """Put the engine to sleep, if this model has one and the process is kept."""
        engine = self.__dict__.pop("_engine", None)
        if engine is None or not self._kept:
            return
        _asleep[:] = [_Asleep(engine, self._arguments, self._shape, self._digest, self._canary(engine))]
        engine.sleep(level=2)

    @property
    def _shape(self) -> dict[str, bytes]:
        return {name: (self._path / name).read_bytes() for name in SHAPE if (self._path / name).is_file()}

    def _canary(self, engine: Any) -> list[float]:
        """Return what the engine gives as log-probabilities of the canary's tokens, but for the first."""
        from vllm import SamplingParams

        tokens = self._canary_tokens
        engine.reset_prefix_cache()
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        (output,) = engine.generate([{"prompt_token_ids": tokens}], [asked], use_tqdm=False)
        engine.reset_prefix_cache()
        return [output.prompt_logprobs[place][token].logprob for place, token in enumerate(tokens) if place]

    def _expected_canary(self) -> list[float]:
        model, _ = load(self._path, self._dtype)
        tokens = self._canary_tokens
        with torch.no_grad():
            chances = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
        return [float(chances[place - 1, token]) for place, token in enumerate(tokens) if place]

    @property
    def _canary_tokens(self) -> list[int]:
        # One is generated behind them.
        return list(self.tokenizer(CANARY)["input_ids"])[: self.max_length - 1]

    def _generate(self, chunk: list[Instance]) -> list[tuple[str, bool]]:
        from vllm import SamplingParams

        settings = normalize_gen_kwargs(chunk[0].args[1])
        until, limit = settings.pop("until"), settings.pop("max_gen_toks")
        sampled, fits = settings.pop("do_sample"), settings.pop(CUT, False)
        if "seed" in settings:
            raise BenchmarkError(
                f"{chunk[0].task_name} gives seed {settings['seed']}, and all samples of a problem would be one: "
                "remove seed from its generation_kwargs."
            )
        # Before the engine is there, which has random numbers of its own.
        seeds = torch.randint(1 << 62, (len(chunk),)).tolist()
        prompts = self._encode([request.args[0] for request in chunk])["input_ids"]
        stops = [stop for stop in until if stop]
        try:
            parameters = [
                SamplingParams(
                    **settings,
                    max_tokens=min(limit, self.max_length - len(prompt)) if fits else limit,
                    seed=seed if sampled else None,
                    stop=stops,
                    stop_token_ids=self._stops,
                    # A stop may be a special token, and is looked for in the text.
                    detokenize=bool(stops),
                    skip_special_tokens=False,
                )
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise BenchmarkError(f"vLLM cannot decode {chunk[0].task_name} by {settings}: {reason}") from error
        return [self._decode(_tokens(output), until) for output in self._run(prompts, parameters)]

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,  # noqa: ARG002  # lm-eval's signature
        override_bs: int | None = None,  # noqa: ARG002
    ) -> list[tuple[float, bool]]:
        from vllm import SamplingParams

        parameters = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=1, detokenize=False)
        rows = [[*context, *continuation] for _, context, continuation in requests]
        likelihoods = []
        for row, (_, context, _), output in zip(rows, requests, self._run(rows, [parameters] * len(rows)), strict=True):
            # Of the likeliest token and the one that is there; the first token follows nothing and has none.
            given = [output.prompt_logprobs[position][row[position]] for position in range(len(context), len(row))]
            likelihoods.append((sum(each.logprob for each in given), all(each.rank == 1 for each in given)))
        return likelihoods

    def _run(self, prompts: Sequence[list[int]], parameters: Sequence[Any]) -> list[Any]:
        # What an earlier chunk left there would change how this one is computed.
        self._engine.reset_prefix_cache()
        outputs: list[Any] = self._engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False
        )
        return outputs


def _tokens(output: Any) -> list[int]:
    (answer,) = output.outputs
    if answer.finish_reason not in ("stop", "length"):
        raise WorkerError(f"vLLM ended an answer by {answer.finish_reason}: evaluate again to go on.")
    return list(answer.token_ids)
