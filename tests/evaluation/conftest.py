"""A tiny random model with a character tokenizer, and what it answers when asked plainly."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

# Two threads fight over a model of this size; set before torch is imported, and inherited by the workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from evaluation.benchmarks.benchmark import write_benchmark
from tests.helpers.processes import command_of

CHARACTERS = "0123456789=+ "
NEW_TOKENS = 40


def write_model(directory: Path, seed: int) -> Path:
    """Write a random Qwen2 of 0.1 M parameters whose tokenizer adds a BOS by a post-processor."""
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<bos>", "<eos>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    tokenizer = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=64
    )
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    # What a checkpoint may carry and a benchmark must not be scored with.
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, max_new_tokens=2)  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny", seed=0)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "other", seed=1)


@pytest.fixture(scope="session")
def ask(model: Path) -> Callable[[str], tuple[str, bool]]:
    """Return a slow and obvious greedy decoder of one prompt: the text, and whether the model ended it itself."""
    network = Qwen2ForCausalLM.from_pretrained(model)
    tokenizer = AutoTokenizer.from_pretrained(model)

    def answer(prompt: str) -> tuple[str, bool]:
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        start = len(tokens)
        with torch.no_grad():
            while len(tokens) < start + NEW_TOKENS and 2 not in tokens[start:]:
                tokens.append(int(network(torch.tensor([tokens])).logits[0, -1].argmax()))
        return str(tokenizer.decode(tokens[start:], skip_special_tokens=True)), tokens[-1] == 2

    return answer


@pytest.fixture(scope="session")
def problems(ask: Callable[[str], tuple[str, bool]]) -> list[dict[str, str]]:
    """Return twelve problems with prompts of several lengths; the model answers every third correctly."""
    prompts = [f"{'7' * (number % 4)}{number}+{number * number}=" for number in range(12)]
    return [
        {"prompt": prompt, "answer": ask(prompt)[0] if number % 3 == 0 else "no"}
        for number, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="session")
def benchmark(problems: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benchmark(
        tmp_path_factory.mktemp("benchmarks"), "plus", problems, max_new_tokens=NEW_TOKENS, order="given"
    )


@pytest.fixture
def edited(benchmark: Path, tmp_path: Path) -> Callable[[str, str], Path]:
    """Return a function that copies the benchmark with one text of its YAML replaced."""

    def edit(old: str, new: str) -> Path:
        text = benchmark.read_text()
        assert old in text
        data = benchmark.with_suffix(".jsonl")
        (tmp_path / data.name).write_bytes(data.read_bytes())
        path = tmp_path / benchmark.name
        path.write_text(text.replace(old, new))
        return path

    return edit


def workers(parent: psutil.Process) -> list[psutil.Process]:
    """Return the live scoring children of a process, among whose children may be what others have left."""
    return [child for child in parent.children() if "evaluation.answers.worker" in command_of(child)]


def written(directory: Path) -> dict[str, Any]:
    """Return what an evaluation left, but for the times that it took and was at."""
    report, results = (json.loads((directory / f"{name}.json").read_text()) for name in ("report", "results"))
    del report["seconds"]
    for name in [name for name in results if "time" in name or name == "date"]:
        del results[name]
    return {"report": report, "results": results, "samples": (directory / "samples.jsonl").read_bytes()}
