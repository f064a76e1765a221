r"""Prompt: how a problem is put to a model.

The paper (arXiv 2605.21468) asks in the raw chat format of Qwen, as text, whatever template the tokenizer brings: only
in this format can its numbers be compared with.
"""

from collections.abc import Mapping

SYSTEM = "You are a helpful assistant."
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


def instructed(problem: Mapping[str, str]) -> str:
    """Return the problem and how to answer it, the user's turn of a chat."""
    return f"{problem['problem']}\n{INSTRUCTION}"


def raw_chat(problem: Mapping[str, str]) -> str:
    """Return the whole prompt in the raw chat format, up to where the assistant's turn begins."""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
        f"<|im_start|>user\n{instructed(problem)}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
