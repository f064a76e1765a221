"""The tokenizer and the supervised model."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.demo.model import BOS, CHARACTERS, EOS, build_tokenizer
from flows.demo.sft import supervise


def test_the_tokenizer_puts_bos_in_front_and_gives_the_text_back() -> None:
    tokenizer = build_tokenizer()
    tokens = tokenizer("518698=156889").input_ids
    assert tokenizer.convert_ids_to_tokens(tokens) == [BOS, *"518698=156889"]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "518698=156889"


def test_the_tokenizer_is_the_same_when_autotokenizer_opens_and_saves_it(tmp_path: Path) -> None:
    built = build_tokenizer()
    built.save_pretrained(tmp_path / "once")
    (tmp_path / "once" / "config.json").write_text('{"model_type": "qwen2"}')
    opened = AutoTokenizer.from_pretrained(tmp_path / "once")
    opened.save_pretrained(tmp_path / "twice")
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in ("once", "twice"))
    assert first == second
    assert len(opened) == len(built) == 3 + len(CHARACTERS)
    assert opened("12=12").input_ids == built("12=12").input_ids
    assert (opened.pad_token, opened.eos_token, opened.padding_side) == ("<pad>", EOS, "left")


@pytest.mark.slow
def test_the_tokenizer_has_a_row_of_the_model_for_every_token(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_same_seed_supervises_the_same_model() -> None:
    torch.set_num_threads(1)  # as the command does: on a busy machine two threads wait for each other
    first, second, other = (supervise(2, seed=seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_another_task_supervises_another_model() -> None:
    torch.set_num_threads(1)
    sorting, adding = supervise(2, seed=3)[0].state_dict(), supervise(2, seed=3, name="add")[0].state_dict()
    assert not torch.equal(sorting["model.embed_tokens.weight"], adding["model.embed_tokens.weight"])
