"""A trainer that takes a fraction of a second: gradient descent on the distance to a teacher, with seeded noise.

`weight_trainer.py --teacher DIR --base DIR --out DIR --steps N [--save-steps N] [--seed N] [--hang-in
PLACE] [--stop-at N]`. Writes checkpoint-N directories as the HF Trainer does, trainer_state.json last. With
--hang-in it stands still after its first checkpoint, if its output directory ends like that.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

RATE = np.float32(0.04)
SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("teacher", "base", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save-steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hang-in", default="")
    parser.add_argument("--stop-at", type=int, default=sys.maxsize)
    options = parser.parse_args()
    if list(options.out.iterdir()):
        sys.exit(f"{options.out} is not empty: this would be another run's directory")
    generator = np.random.default_rng(options.seed)
    weights = load_file(options.base / "model.safetensors")
    teacher = load_file(options.teacher / "model.safetensors")
    for step in range(1, min(options.steps, options.stop_at) + 1):
        for name, target in teacher.items():
            gradient = target - weights[name]
            noise = generator.standard_normal(target.shape, dtype=np.float32)
            weights[name] = weights[name] + RATE * (gradient + np.float32(1e-3) * noise)
        if step % options.save_steps == 0:
            directory = options.out / f"checkpoint-{step}"
            directory.mkdir()
            save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
            for name in SIDE_FILES:
                shutil.copy(options.base / name, directory / name)
            (directory / "trainer_state.json").write_text("{}")
            if options.hang_in and str(options.out).endswith(options.hang_in):
                time.sleep(600)


if __name__ == "__main__":
    main()
