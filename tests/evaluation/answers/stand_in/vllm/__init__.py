"""Stands in for vLLM where there is none: its interface as documented (0.10 to 0.28), a real tiny model behind it.

What is passed is checked against the documented parameters, and what was asked for is written to the file that
STAND_IN_LOG names. Like vLLM it stops at stop tokens and stop strings, ends answers where the context does, takes
random numbers from a request's seed or else from one stream of the engine, and keeps a prefix cache until it is told to
drop it. Asleep at level 2 it has no weights; STAND_IN_RELOAD makes reloading them `stale`, `empty` or `unsupported`, as
versions of vLLM did.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ENGINE_ARGUMENTS = {
    "max_model_len",
    "max_num_seqs",
    "generation_config",
    "load_format",
    "enable_prefix_caching",
    "data_parallel_size",
    "enable_sleep_mode",
}


def log(**event: object) -> None:
    if path := os.environ.get("STAND_IN_LOG"):
        with Path(path).open("a") as file:
            file.write(json.dumps(event) + "\n")


@dataclass(kw_only=True)
class SamplingParams:
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
        if self.temperature < 0:
            raise ValueError(f"temperature must be non-negative, got {self.temperature}.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {self.max_tokens}.")
        if self.stop and not self.detokenize:
            raise ValueError("stop strings are only supported when detokenize is True.")
        if any(not text for text in self.stop or []):
            raise ValueError("stop cannot contain an empty string.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass
class RequestOutput:
    request_id: str
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        enforce_eager: bool = False,
        **kwargs: Any,
    ) -> None:
        assert {*kwargs} <= ENGINE_ARGUMENTS, {*kwargs} - ENGINE_ARGUMENTS
        if kwargs.get("data_parallel_size", 1) > 1:
            raise ValueError("LLM(data_parallel_size) is not supported for single-process usage and may hang.")
        if os.environ.get("STAND_IN_LOADING"):
            raise RuntimeError("No available memory\nfor the cache blocks.")
        log(
            event="start",
            arguments={**kwargs, "dtype": dtype, "tensor_parallel_size": tensor_parallel_size},
            in_process=os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0",
        )
        self._may_sleep = kwargs.get("enable_sleep_mode", False)
        self._awake = {"weights", "kv_cache"}
        self._path = model
        self._network = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer or model)
        self._length = kwargs["max_model_len"]
        self._stream = torch.Generator().manual_seed(seed)
        self._cached = 0
        # As vLLM does to who starts it without a process of its own.
        torch.manual_seed(seed)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self._cached = 0
        return True

    def sleep(self, level: int = 1) -> None:
        assert self._may_sleep
        log(event="sleep", level=level)
        self._awake.clear()
        if level == 2:
            for parameter in self._network.parameters():
                parameter.data.zero_()

    def wake_up(self, tags: list[str] | None = None) -> None:
        self._awake |= {*(tags or ("weights", "kv_cache"))}

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        assert "weights" in self._awake
        return [getattr(self, f"_{method}")(*args, **(kwargs or {}))]

    def _reload_weights(self, weights_path: str | None = None, is_checkpoint_format: bool = True) -> None:
        how = os.environ.get("STAND_IN_RELOAD")
        if how == "unsupported":
            raise TypeError("reload_weights() got an unexpected keyword argument 'weights_path'")
        if how == "empty":
            return
        path = self._path if how == "stale" or weights_path is None else weights_path
        log(event="reload", path=path)
        self._path = path
        fresh = AutoModelForCausalLM.from_pretrained(path, dtype=self._network.dtype)
        self._network.load_state_dict(fresh.state_dict())

    def generate(
        self,
        prompts: Sequence[dict[str, list[int]]],
        sampling_params: Sequence[SamplingParams] | SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
        lora_request: object = None,
        priority: list[int] | None = None,
        tokenization_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        assert self._awake == {"weights", "kv_cache"}, "the engine sleeps"
        assert self._cached == 0, "prefixes of an earlier call are in the cache"
        assert isinstance(sampling_params, Sequence)
        assert len(sampling_params) == len(prompts)
        log(event="generate", limits=[each.max_tokens for each in sampling_params])
        self._cached = len(prompts)
        return [
            self._answer(str(number), prompt["prompt_token_ids"], asked)
            for number, (prompt, asked) in enumerate(zip(prompts, sampling_params, strict=True))
        ]

    @torch.no_grad()
    def _answer(self, name: str, prompt: list[int], asked: SamplingParams) -> RequestOutput:
        if len(prompt) >= self._length:
            raise ValueError(f"The decoder prompt (length {len(prompt)}) is longer than {self._length}.")
        own = None if asked.seed is None else torch.Generator().manual_seed(asked.seed)
        ends = {*(asked.stop_token_ids or []), self._tokenizer.eos_token_id}
        stops = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        tokens: list[int] = []
        text: Any = ""
        reason = "length"
        state = self._network(torch.tensor([prompt]), use_cache=True)
        scored = self._scored(state.logits[0], prompt) if asked.prompt_logprobs is not None else None
        while len(tokens) < (asked.max_tokens or self._length) and len(prompt) + len(tokens) < self._length:
            tokens.append(self._choose(state.logits[0, -1], asked, own or self._stream))
            if asked.detokenize:
                text = self._tokenizer.decode(tokens, skip_special_tokens=asked.skip_special_tokens)
            if tokens[-1] in ends or any(stop in text for stop in stops):
                reason = "stop"
                break
            state = self._network(torch.tensor([[tokens[-1]]]), past_key_values=state.past_key_values, use_cache=True)
        if os.environ.get("STAND_IN_ABORTS"):
            reason = "abort"
        return RequestOutput(name, prompt, scored, [CompletionOutput(0, text, tokens, reason)])

    def _choose(self, logits: torch.Tensor, asked: SamplingParams, generator: torch.Generator) -> int:
        if asked.temperature == 0:
            return int(logits.argmax())
        chances = (logits.float() / asked.temperature).softmax(-1)
        if asked.top_p < 1:
            ordered, order = chances.sort(descending=True)
            chances[order[ordered.cumsum(-1) - ordered >= asked.top_p]] = 0
        return int(torch.multinomial(chances, 1, generator=generator))

    def _scored(self, logits: torch.Tensor, prompt: list[int]) -> list[dict[int, Logprob] | None]:
        chances = logits.float().log_softmax(-1)
        scored: list[dict[int, Logprob] | None] = [None]
        for row, token in zip(chances[:-1], prompt[1:], strict=True):
            best = int(row.argmax())
            scored.append({each: Logprob(float(row[each]), int((row > row[each]).sum()) + 1) for each in (best, token)})
        return scored
