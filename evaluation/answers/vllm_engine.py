"""vLLM engine: a model answered for by vLLM (https://docs.vllm.ai), chunk by chunk, in this process.

Around the engine everything is as for transformers: how a prompt becomes tokens, where an answer ends, what is
truncated and what the journal keeps.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from evaluation.answers.backend import RUNNING, Backend
from evaluation.answers.devices import NO_WEIGHTS, device_kind
from evaluation.answers.lm import CUT, JournalledLM
from evaluation.errors import BenchmarkError, DeviceError, ModelError, WorkerError

ENVIRONMENT = {
    # The engine in this process dies with it, and schedules the same requests the same way each time.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class EngineLM(JournalledLM):
    """A model whose answers come from vLLM; the engine starts with the first answer that no journal holds.

    A sampled answer has a seed of its own, drawn from its chunk's: it depends on no other chunk, and repeats differ.
    """

    def __init__(
        self, path: Path, *, device: str, dtype: str, batch_size: int, max_length: int | None, backend: Backend
    ) -> None:
        """Read configuration and tokenizer; the weights are vLLM's to load."""
        super().__init__(path, device=NO_WEIGHTS, dtype=dtype, batch_size=batch_size, max_length=max_length)
        self._can_answer = True
        # vLLM takes one token more than it is asked for likelihoods of.
        self._likelihood_room = 1
        self._arguments = {
            "model": str(path),
            "dtype": dtype,
            "load_format": "safetensors",
            "trust_remote_code": False,
            # The checkpoint's sampling settings must not leak into a benchmark's.
            "generation_config": "vllm",
            "max_model_len": self.max_length,
            "max_num_seqs": min(RUNNING, batch_size),
            "tensor_parallel_size": backend.tensor_parallel_size,
            "gpu_memory_utilization": backend.gpu_memory_utilization,
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
        try:
            return LLM(**self._arguments)
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            path = self._arguments["model"]
            raise ModelError(f"vLLM cannot load {path}: {' '.join(str(error).split())}") from error

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
