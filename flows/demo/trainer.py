"""The demo's training run, as a process of its own: `python -m flows.demo.trainer --base BASE --out RUN --steps 360`.

It knows nothing of whoever reads its checkpoints: RUN/checkpoint-N appears as any TRL user's would.
"""

import json
import logging
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flows.demo.command import Arguments, count, execute
from flows.demo.errors import BaseModelError, OutputExistsError

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


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 refused with one line, 2 wrong usage."""
    parser = Arguments(
        prog="python -m flows.demo.trainer",
        description="Train a base model with GRPO and save checkpoint-N directories.",
        epilog="example: python -m flows.demo.trainer --base demo/base --out demo/run --steps 360 --save-steps 2",
    )
    parser.add_argument("--base", type=Path, required=True, help="a model directory written by flows.demo.pretrain")
    parser.add_argument("--out", type=Path, required=True, help="new or empty directory for the checkpoints")
    parser.add_argument("--task", choices=["sort", "add"], default="sort", help="what is rewarded (default sort)")
    parser.add_argument("--steps", type=count, default=360, help="training steps (default 360)")
    parser.add_argument("--save-steps", type=count, default=1, help="steps between checkpoints (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and of the sampling (default 0)")
    parser.add_argument("--prompts", type=count, default=32, help="problems a step; fewer are noisier (default 32)")
    parser.add_argument("--learning-rate", type=float, default=4e-6, help="constant (default 4e-6)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="float32", help="of the stored weights (default float32)"
    )
    chosen = parser.parse_args(arguments)

    def work() -> None:
        check_base(chosen.base)
        check_out(chosen.out)
        from flows.demo.grpo import train

        train(
            chosen.base,
            chosen.out,
            name=chosen.task,
            steps=chosen.steps,
            save_steps=chosen.save_steps,
            seed=chosen.seed,
            prompts=chosen.prompts,
            learning_rate=chosen.learning_rate,
            stored_dtype=chosen.dtype,
        )
        _log.info("trained %d steps into %s", chosen.steps, chosen.out)

    execute(work)


if __name__ == "__main__":
    main()
