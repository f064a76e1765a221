"""A task so small that a model of a few thousand weights learns it: which of two digits is larger."""

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from flows.demo.model import build_tokenizer


def write_models(root: Path) -> None:
    """Write an untrained base and a teacher that says which of two digits is larger."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=True,
        initializer_range=0.2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
    )
    model = Qwen2ForCausalLM(config)
    texts = [row["prompt"] + row["answer"] for row in larger()]
    tokens = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts])
    labels = tokens.clone()
    labels[:, :4] = -100
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for name, steps in (("base", 0), ("teacher", 150)):
        for _ in range(steps):
            optimizer.zero_grad()
            model(input_ids=tokens, labels=labels).loss.backward()
            optimizer.step()
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)


def larger() -> list[dict[str, str]]:
    return [{"prompt": f"{a}{b}=", "answer": str(max(a, b))} for a in range(10) for b in range(10)]
