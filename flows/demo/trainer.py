"""The demo's training run, as a process of its own: `python -m flows.demo.trainer --base BASE --out RUN --steps 360`.

It knows nothing of whoever reads its checkpoints: RUN/checkpoint-N appears as any TRL user's would.
"""

import json
import logging
from pathlib import Path
from typing import Annotated, Literal

import typer
from safetensors import SafetensorError, safe_open

from flows.arguments import run_module
from flows.demo.errors import BaseModelError, OutputExistsError
from flows.demo.process import Task, execute

_log = logging.getLogger(__name__)


def check_base(base: Path) -> None:
    """Refuse a base with a file missing or torn, before anything slow is imported."""
    way_out = f"write a base with python -m flows.demo.pretrain --out {base}"
    needed = ("config.json", "tokenizer.json", "model.safetensors")
    if missing := [name for name in needed if not (base / name).is_file()]:
        raise BaseModelError(f"{base} is no complete model: {', '.join(missing)} missing; {way_out}")
    for name in needed:
        try:
            _read(base / name)
        except (ValueError, SafetensorError) as error:
            raise BaseModelError(f"{base / name} is damaged ({error}); remove {base} and {way_out}") from error


def _read(file: Path) -> None:
    if file.suffix == ".json":
        json.loads(file.read_bytes())
    else:
        with safe_open(file, framework="numpy"):
            pass


def check_out(out: Path) -> None:
    """Refuse an output directory with anything in it: two training runs in one directory could not be told apart."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputExistsError(f"{out} exists and is not an empty directory; remove it or choose another --out")


def main(
    base: Annotated[Path, typer.Option(help="A model directory written by flows.demo.pretrain.")],
    out: Annotated[Path, typer.Option(help="New or empty directory for the checkpoints.")],
    *,
    task: Annotated[Task, typer.Option(help="What is rewarded.")] = "sort",
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 360,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the problems and of the sampling.")] = 0,
    prompts: Annotated[int, typer.Option(min=1, help="Problems a step; fewer are noisier.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="At the first step.")] = 4e-6,
    schedule: Annotated[
        Literal["constant", "linear", "cosine"], typer.Option(help="Of the learning rate; the others end at 0.")
    ] = "constant",
    reward: Annotated[
        Literal["exact", "credit"], typer.Option(help="The right answer, or the share of it that is right.")
    ] = "exact",
    lora: Annotated[int, typer.Option(min=0, help="Rank of an adapter that is trained instead; 0: none.")] = 0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Of the stored weights.")] = "float32",
) -> None:
    """Train a base model with GRPO and save checkpoint-N directories.

    Exit status 0 done, 1 refused with one line, 2 wrong usage.
    Example: python -m flows.demo.trainer --base demo/base --out demo/run --steps 360 --save-steps 2
    """

    def work() -> None:
        check_base(base)
        check_out(out)
        from flows.demo.grpo import train

        train(
            base,
            out,
            name=task,
            steps=steps,
            save_steps=save_steps,
            seed=seed,
            prompts=prompts,
            learning_rate=learning_rate,
            schedule=schedule,
            reward=reward,
            lora=lora,
            stored_dtype=dtype,
        )
        _log.info("trained %d steps into %s", steps, out)

    execute(work)


if __name__ == "__main__":
    run_module("flows.demo.trainer", main)
