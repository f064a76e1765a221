"""How far a model is from its base, against the sum written out token by token."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, Qwen2ForCausalLM

from evaluation.answers import divergence as module
from evaluation.answers.divergence import divergence
from evaluation.errors import ModelError


def test_it_is_the_mean_over_all_tokens_of_all_prompts_of_what_the_distributions_differ_by(
    model: Path, other_model: Path, benchmark: Path, problems: list[dict[str, str]], tmp_path: Path
) -> None:
    measured = divergence([other_model, model], model, str(benchmark), cache=tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    theirs, ours = (Qwen2ForCausalLM.from_pretrained(path) for path in (model, other_model))
    each = []
    for problem in problems:
        tokens = torch.tensor([tokenizer(problem["prompt"])["input_ids"]])
        with torch.no_grad():
            p, q = (network(tokens).logits[0].double().softmax(-1) for network in (ours, theirs))
        each += [float(sum(a * (a / b).log() for a, b in zip(*row, strict=True))) for row in zip(p, q, strict=True)]
    assert measured.nats[0] == pytest.approx(sum(each) / len(each), rel=1e-4)
    assert measured.nats[1] == pytest.approx(0.0, abs=1e-6)
    assert (measured.benchmark, measured.prompts, measured.tokens) == ("plus", len(problems), len(each))
    # It is kept by content: no process starts again.
    (kept,) = tmp_path.glob("divergence-*.json")
    kept.write_text(kept.read_text().replace(f'"tokens": {len(each)}', '"tokens": 1'))
    assert divergence([other_model, model], model, str(benchmark), cache=tmp_path).tokens == 1


def test_a_model_that_cannot_be_loaded_is_refused_with_its_reason(model: Path, benchmark: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match="cannot be loaded"):
        divergence([broken], model, str(benchmark), cache=tmp_path)
    assert module.PROMPTS * module.LONGEST == 65_536
