"""Log-probabilities of fixed responses, token by token: what a model makes of texts that it did not choose itself."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.answers.fingerprint import fingerprint
from evaluation.errors import BenchmarkError, ModelError


@dataclass(frozen=True)
class Response:
    """A prompt and one fixed continuation of it, as text."""

    prompt: str
    response: str


def read_responses(path: Path) -> list[Response]:
    """Read JSONL of objects with a `prompt` and a `response`; BenchmarkError names the first line that is none."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"responses {path} cannot be read ({error}): pass a JSONL file.") from error
    responses = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            pair = row["prompt"], row["response"]
        except (ValueError, KeyError, TypeError):
            pair = None
        if pair is None or not all(isinstance(text, str) and text for text in pair):
            raise BenchmarkError(f"{path}: line {number} is no object with the texts prompt and response: correct it.")
        responses.append(Response(*pair))
    if not responses:
        raise BenchmarkError(f"responses {path} is empty: write at least one line with a prompt and a response.")
    return responses


def token_logprobs(
    model: Path, responses: Sequence[Response], *, device: str = "cpu", dtype: str = "auto"
) -> list[list[float]]:
    """Return, for each response, the natural log-probability of each of its tokens after the prompt and those before.

    The model is a directory, loaded into this process; log-softmax is taken in fp32. Prompt and response are encoded
    apart, so the tokens are the same whatever the model thinks. Raises ModelError, and BenchmarkError for what is
    longer than the model can hold.
    """
    import torch
    from transformers.utils import logging

    from evaluation.answers.lm import load

    # A bar for every model would run through the caller's own.
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    subject = fingerprint(model)
    chosen = subject.dtype if dtype == "auto" else dtype
    if chosen is None:
        raise ModelError(f"{model}: config.json states no dtype: pass dtype.")
    network, tokenizer = load(model, chosen)
    network.to(device).eval()
    longest = getattr(network.config, "max_position_embeddings", None)
    logprobs = []
    for number, pair in enumerate(responses, start=1):
        prompt: list[int] = tokenizer(pair.prompt)["input_ids"]
        response: list[int] = tokenizer(pair.response, add_special_tokens=False)["input_ids"]
        if longest is not None and len(prompt) + len(response) > longest:
            raise BenchmarkError(
                f"response {number} has {len(prompt) + len(response)} tokens with its prompt and the model holds"
                f" {longest}: leave it out."
            )
        with torch.inference_mode():
            # The last token's successor is nobody's question.
            logits = network(torch.tensor([[*prompt, *response[:-1]]], device=device)).logits[0, len(prompt) - 1 :]
        chances = torch.log_softmax(logits.float(), dim=-1)
        logprobs.append(chances[torch.arange(len(response)), torch.tensor(response, device=device)].tolist())
    return logprobs
