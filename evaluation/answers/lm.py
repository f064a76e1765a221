"""Language model: lm-eval's Hugging Face model, answering in fixed chunks that a journal keeps."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from evaluation.answers.chat_template import rendered
from evaluation.answers.devices import NO_WEIGHTS
from evaluation.answers.job import WHOLE, AnsweredPart, WorkerPart
from evaluation.answers.journal import Journal
from evaluation.digest import digest_value
from evaluation.errors import BenchmarkError, ModelError, WorkerError

# A generation setting of ours: answers end, truncated, where the model's context does, as vLLM ends them. Without it a
# benchmark that asks for more tokens than there is room for is refused.
CUT = "cut_to_context"


@dataclass(frozen=True)
class Spent:
    """What was generated, not found in a journal: answers, their tokens (0 for likelihoods), seconds in the model."""

    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0


class JournalledLM(HFLM):  # type: ignore[misc]  # lm_eval carries no types
    """A model whose answers depend on the requests alone, never on what was answered before.

    A chunk is `batch_size` requests in the benchmark's order, so padding and batching are the same whatever the journal
    holds already, and each chunk starts from a seed of its own. `truncated` tells, for each answer of the last call of
    `generate_until`, whether the token limit cut it off; `spent` what was generated since the journal was given.
    """

    def __init__(self, path: Path, *, device: str, dtype: str, batch_size: int, max_length: int | None = None) -> None:
        """Load the model directory; ModelError when its weights do not fill exactly the architecture it names.

        On the device of no weights only journals answer.
        """
        model, tokenizer = load(path, dtype, device)
        super().__init__(
            pretrained=model.to(device),
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_length=max_length,
            backend="causal",
        )
        self._can_answer = device != NO_WEIGHTS
        self._likelihood_room = 0
        self._stop_at(stop_tokens(model, tokenizer))
        self.truncated: list[bool] = []
        self.spent = Spent()

    def keep(self, journal: Journal, on_chunk: Callable[[int, int], None], part: WorkerPart = WHOLE) -> None:
        """Answer from and into `journal` from now on, calling `on_chunk(done, total)` in requests after each chunk.

        With a part of several, only its chunks are answered, and AnsweredPart is raised when they are.
        """
        self._journal = journal
        self._on_chunk = on_chunk
        self._part = part
        self.spent = Spent()

    def release(self) -> None:
        """Give up what outlives this object on a device."""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:  # the signature is lm-eval's
        """Return a prompt in the model's own chat template; ModelError when that does not come to an end, or fails."""
        apply = partial(super().apply_chat_template, chat_history, add_generation_prompt)
        return rendered(apply, model=str(self.tokenizer.name_or_path))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text generated for each request, up to its first stop sequence."""
        self._refuse_too_long(requests, [request.args[0] for request in requests], _token_limit)
        answers = self._answer("generate_until", requests, self._generate)
        self.truncated = [truncated for _, truncated in answers]
        return [text for text, _ in answers]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return, for each request, the log-likelihood of its continuation and whether it is the greedy one."""
        self._refuse_too_long(
            requests, ["".join(request.args) for request in requests], lambda _: self._likelihood_room
        )
        answers = self._answer("loglikelihood", requests, partial(super().loglikelihood, disable_tqdm=True))
        return [(likelihood, greedy) for likelihood, greedy in answers]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the log-likelihood of each request's whole text."""
        answer = partial(super().loglikelihood_rolling, disable_tqdm=True)
        return self._answer("loglikelihood_rolling", requests, answer)

    def _stop_at(self, stops: set[int]) -> None:
        # The checkpoint's sampling settings must not leak into a benchmark's; where to stop is the model's own affair.
        self._stops = sorted(stops)
        self.model.generation_config = GenerationConfig(eos_token_id=self._stops or None)  # type: ignore[no-untyped-call]

    def _answer(self, kind: str, requests: list[Instance], answer: Callable[[list[Instance]], list[Any]]) -> list[Any]:
        answers: list[Any] = []
        for number, start in enumerate(range(0, len(requests), self.batch_size)):
            if not self._part.holds(number):
                continue
            chunk = requests[start : start + self.batch_size]
            # The start tells repeats of one request apart: each shall be another sample.
            key = digest_value([kind, start, [list(request.args) for request in chunk]])
            kept = self._journal.find(key)
            if kept is None:
                if not self._can_answer:
                    raise WorkerError(
                        f"answers from {start} on of {chunk[0].task_name} are in no journal: evaluate again to go on."
                    )
                torch.manual_seed(int(key[:12], 16))
                started = time.perf_counter()
                self._tokens = 0
                kept = answer(chunk)
                seconds = time.perf_counter() - started
                self._journal.append(key, kept, seconds=seconds)
                spent = self.spent
                self.spent = Spent(spent.answers + len(chunk), spent.tokens + self._tokens, spent.seconds + seconds)
            answers += kept
            self._on_chunk(len(answers), len(requests))
        if self._part != WHOLE:
            raise AnsweredPart
        return answers

    def _generate(self, chunk: list[Instance]) -> list[tuple[str, bool]]:
        settings = normalize_gen_kwargs(chunk[0].args[1])
        until, limit = settings.pop("until"), settings.pop("max_gen_toks")
        if settings["do_sample"]:
            # Unless a benchmark states it: transformers would sample from the 50 likeliest tokens.
            settings.setdefault("top_k", 0)
        fits = settings.pop(CUT, False)
        prompts = self._encode(
            [request.args[0] for request in chunk], padding=True, padding_side="left", return_tensors="pt"
        )
        width = prompts["input_ids"].shape[1]
        if fits:
            limit = min(limit, self.max_length - width)
        rows = self._model_generate(
            context=prompts["input_ids"].to(self.device),
            attention_mask=prompts["attention_mask"].to(self.device),
            # An empty one would end every answer at once.
            stop=[stop for stop in until if stop],
            max_length=width + limit,
            **settings,
        )
        return [self._decode(row, until) for row in rows[:, width:].tolist()]

    def _encode(self, texts: list[str], **options: Any) -> Any:  # transformers' BatchEncoding
        # A chat template has written the first token as text, and the tokenizer would write it again.
        written = self.tokenizer.bos_token is not None and all(
            text.startswith(self.tokenizer.bos_token) for text in texts
        )
        return self.tokenizer(texts, add_special_tokens=not written, **options)

    def _decode(self, tokens: list[int], until: list[str]) -> tuple[str, bool]:
        end = next((position for position, token in enumerate(tokens) if token in self._stops), None)
        self._tokens += len(tokens) if end is None else end + 1
        raw = self.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        text = postprocess_generated_text(raw, until, None)
        return text, end is None and text == raw

    def _refuse_too_long(
        self, requests: Sequence[Instance], texts: Sequence[str], room: Callable[[Instance], int]
    ) -> None:
        # lm-eval would cut the beginning of the prompt off, silently.
        for request, tokens in zip(requests, self._encode(list(texts))["input_ids"], strict=True):
            if len(tokens) + room(request) > self.max_length:
                raise BenchmarkError(
                    f"problem {request.doc_id} of {request.task_name} has {len(tokens)} tokens and may generate "
                    f"{room(request)}, more than the {self.max_length} the model can hold: "
                    "lower max_gen_toks or drop the problem."
                )


def _token_limit(request: Instance) -> int:
    settings = normalize_gen_kwargs(request.args[1])
    return 1 if settings.get(CUT) else int(settings["max_gen_toks"])


def stop_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer of a loaded model: all of its generation config's and its tokenizer's."""
    stops = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(stops if isinstance(stops, list) else [stops])} - {None}


def load(path: Path, dtype: str, device: str = "cpu") -> tuple[Any, Any]:
    """Return model and tokenizer; ModelError when the weights do not fill exactly the architecture.

    The model is on the CPU, or for the device of no weights is its architecture alone.
    """
    causal: Any = AutoModelForCausalLM  # transformers does not type output_loading_info
    try:
        if device == NO_WEIGHTS:
            return _architecture(path, dtype), _tokenizer(path)
        model, info = causal.from_pretrained(
            path,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = _tokenizer(path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {' '.join(str(error).split())}") from error
    # transformers fills such tensors with random numbers and goes on.
    unfilled = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if unfilled:
        raise ModelError(
            f"{path} lacks {len(unfilled)} tensors that its config.json asks for, such as {unfilled[0]}: "
            "write the model again."
        )
    return model, tokenizer


def _tokenizer(path: Path) -> Any:
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _architecture(path: Path, dtype: str) -> Any:
    causal: Any = AutoModelForCausalLM
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = causal.from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path, local_files_only=True)
    return model
