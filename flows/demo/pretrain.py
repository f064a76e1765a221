"""The demo's base model, as a process of its own: `python -m flows.demo.pretrain --out BASE`.

BASE is a plain Hugging Face directory that appears under its name when it is whole.
"""

import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from flows.arguments import run_module
from flows.demo.errors import OutputExistsError
from flows.demo.process import Task, execute

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

_log = logging.getLogger(__name__)


def check_out(out: Path) -> None:
    """Refuse an output that exists: a base is never changed under a run that began with it."""
    if out.exists():
        raise OutputExistsError(f"{out} exists; remove it or choose another --out")


def publish(model: "Qwen2ForCausalLM", tokenizer: "Qwen2Tokenizer", out: Path) -> None:
    """Write model and tokenizer into a hidden sibling, make it durable, and rename it to `out`."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed right here
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    readable = (partial / "config.json").stat().st_mode
    for file in partial.iterdir():
        file.chmod(readable)  # safetensors makes its files private, whatever the umask
        _flush(file)
    _flush(partial)
    try:
        partial.rename(out)
    except OSError as error:
        raise OutputExistsError(f"{out} appeared meanwhile; the new model is in {partial}") from error
    _flush(out.parent)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def main(
    out: Annotated[Path, typer.Option(help="Directory to write; must not exist.")],
    *,
    steps: Annotated[int, typer.Option(min=1, help="Batches of 48 texts.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the weights and the corpus.")] = 0,
    task: Annotated[Task, typer.Option(help="What is rewarded later.")] = "sort",
    width: Annotated[int, typer.Option(min=8, help="Of the hidden states.")] = 128,
    layers: Annotated[int, typer.Option(min=1, help="Of the model.")] = 2,
) -> None:
    """Supervise a tiny model on a corpus whose authors disagree, and write it as a base model.

    Exit status 0 done, 1 refused with one line, 2 wrong usage.
    Example: python -m flows.demo.pretrain --out demo/base --seed 0
    """

    def work() -> None:
        check_out(out)
        from flows.demo.sft import supervise

        publish(*supervise(steps, seed=seed, name=task, width=width, layers=layers), out)
        _log.info("wrote %s", out)

    execute(work)


if __name__ == "__main__":
    run_module("flows.demo.pretrain", main)
