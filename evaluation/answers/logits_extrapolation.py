"""Logits extrapolation: a model that no directory holds, two models decoding in lock-step (arXiv 2601.04537)."""

import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import resolve_max_length
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import Cache, GenerationConfig
from transformers.generation.configuration_utils import GenerationMode

from evaluation.answers.fingerprint import LogitsExtrapolation
from evaluation.answers.lm import JournalledLM, load, stop_tokens
from evaluation.digest import digest_value
from evaluation.errors import BenchmarkError, ModelError


class LogitsExtrapolationLM(JournalledLM):
    """The end model, its logits replaced by z_start + alpha (z_end - z_start) in fp32 wherever they are computed.

    The mix is what generation and likelihoods see: penalties, temperature and top-p come after it. Each model has a
    key-value cache of its own. An answer ends where either model would end it, and the shorter context is both's.
    """

    def __init__(self, pair: LogitsExtrapolation, *, device: str, dtype: str, batch_size: int) -> None:
        """Load both models; ModelError when one cannot be loaded or they do not share tokenizer and vocabulary."""
        super().__init__(pair.end, device=device, dtype=dtype, batch_size=batch_size)
        start, tokenizer = load(pair.start, dtype, device)
        _refuse_other_vocabulary(pair, (self.model, self.tokenizer), (start, tokenizer))
        self._stop_at({*self._stops, *stop_tokens(start, tokenizer)})
        self._max_length = min(
            self.max_length, resolve_max_length(start.config, tokenizer, default=self._DEFAULT_MAX_LENGTH)
        )
        self._start = start.to(device)
        self._alpha = pair.alpha
        # By the end model's cache, so that the start model's is freed with it.
        self._start_caches: WeakKeyDictionary[Cache, Cache] = WeakKeyDictionary()
        self.model.register_forward_hook(self._mix, with_kwargs=True)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text generated for each request; BenchmarkError for a search that rewrites the cache."""
        mode = GenerationConfig(**normalize_gen_kwargs(requests[0].args[1])).get_generation_mode()  # type: ignore[no-untyped-call]
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise BenchmarkError(
                f"{requests[0].task_name} decodes by {mode.value} and two models in lock-step decode by "
                f"{GenerationMode.GREEDY_SEARCH.value} or {GenerationMode.SAMPLE.value}: change its generation_kwargs."
            )
        return super().generate_until(requests)

    def _model_call(self, inps: Tensor, attn_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        # lm-eval takes the softmax of likelihoods in the dtype of the logits: the same as for one model alone.
        logits: Tensor = super()._model_call(inps, attn_mask, labels)
        return logits.to(self.model.dtype)

    def _mix(self, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        cache = kwargs.get("past_key_values")
        own = None if cache is None else self._start_caches.get(cache)
        start = self._start(*args, **{**kwargs, "past_key_values": own})
        if cache is not None:
            self._start_caches[cache] = start.past_key_values
        # Of all ways to write it, lerp gives back each end bit for bit at alpha 0 and 1.
        output.logits = torch.lerp(start.logits.float(), output.logits.float(), self._alpha)
        return output


def _refuse_other_vocabulary(pair: LogitsExtrapolation, end: tuple[Any, Any], start: tuple[Any, Any]) -> None:
    ends, starts = _vocabulary(*end), _vocabulary(*start)
    for name, value in ends.items():
        if value != starts[name]:
            raise ModelError(
                f"{name} is {value} for {pair.end} and {starts[name]} for {pair.start}: logits are mixed token by "
                "token, pass two checkpoints of one training run."
            )


def _vocabulary(network: Any, tokenizer: Any) -> dict[str, object]:
    encoding: Any = tokenizer.get_vocab()
    if tokenizer.is_fast:
        encoding = json.loads(tokenizer.backend_tokenizer.to_str())
        # How a trainer last filled a batch, not how a text is encoded.
        del encoding["padding"], encoding["truncation"]
    return {
        "vocab_size": network.config.vocab_size,
        "the number of tokens": len(tokenizer),
        "the tokenizer's digest": digest_value(encoding)[:12],
    }
