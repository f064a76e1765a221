"""The demo's model: a Qwen2 of 0.4 million parameters and its character tokenizer, both built from nothing.

One character is one token, and every text begins with <bos>, which the tokenizer itself adds.
"""

import torch
from tokenizers.processors import TemplateProcessing
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CHARACTERS = "0123456789="
MAX_LENGTH = 64


def build_tokenizer() -> Qwen2Tokenizer:
    """Return the tokenizer: one token a character, <bos> put in front by its own post-processor, padding on the left.

    Characters outside the vocabulary are dropped.
    """
    vocabulary = {token: number for number, token in enumerate([PAD, BOS, EOS, *CHARACTERS])}
    # Whatever class the files name, AutoTokenizer opens a Qwen2 model's tokenizer as this one and, where they differ,
    # adds a token that the model has no row for. Without merges it is a character tokenizer, and survives the trip.
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary,
        merges=[],
        unk_token=PAD,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return tokenizer


def build_model(tokenizer: Qwen2Tokenizer, *, seed: int, width: int = 128, layers: int = 2) -> Qwen2ForCausalLM:
    """Return an untrained fp32 model for the tokenizer's vocabulary; the same seed gives the same weights.

    `width` is a multiple of 8; width 384 and 3 layers make 5.3 million parameters.
    """
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=3 * width,
        tie_word_embeddings=True,
        initializer_range=0.08,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype=torch.float32,
    )
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(config)
