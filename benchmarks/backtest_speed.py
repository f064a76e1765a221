"""How long the backtest computes: 340 tensors x 75 checkpoints, as a 1.5 B parameter model saved every 10 steps has.

The Grams are those of random runs: a drift, a random walk and noise, in shares that differ from tensor to tensor.
Prints seconds of one core for the usual ways, and for one more method beside them, with its share of the cells.

    .venv/bin/python benchmarks/backtest_speed.py [--tensors 340] [--checkpoints 75] [--method SPEC …]
"""

import argparse
import time

import torch

from relex.backtest.backtest import backtest
from relex.gram import Gram

METHODS = (
    "relex:rank=3", "polynomial", "raw", "weight-extrapolation", "expo", "first-update:alpha=10", "mean:last=3",
)  # fmt: skip
# What a delta has of its own: more of it changes no time.
_SIZE = 200


def random_gram(tensors: int, checkpoints: int) -> Gram:
    """Return the Gram of a run that was saved every 10 steps."""
    generator = torch.Generator().manual_seed(0)
    shape = (tensors, checkpoints, _SIZE)
    steps = tuple(range(10, 10 * checkpoints + 10, 10))
    direction = torch.randn(tensors, 1, _SIZE, generator=generator, dtype=torch.float64)
    increments = torch.randn(shape, generator=generator, dtype=torch.float64)
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    share = torch.rand(tensors, 1, 1, generator=generator, dtype=torch.float64)
    times = torch.arange(1, checkpoints + 1, dtype=torch.float64)[:, None]
    deltas = share * times * direction + (1.0 - share) * increments.cumsum(1) + noise
    names = tuple(f"tensor {number}" for number in range(tensors))
    digests = tuple(f"checkpoint {step}" for step in steps)
    return Gram(steps, names, deltas @ deltas.mT, torch.ones(tensors, dtype=torch.float64), "base", digests, digests)


def main() -> None:
    """Print a line a method."""
    parser = argparse.ArgumentParser(description="How long the backtest computes.")
    parser.add_argument("--tensors", type=int, default=340)
    parser.add_argument("--checkpoints", type=int, default=75)
    parser.add_argument("--method", action="append", help="beside the usual ways; may be repeated")
    given = parser.parse_args()
    torch.set_num_threads(1)
    gram = random_gram(given.tensors, given.checkpoints)
    for methods in ((), *((spec,) for spec in given.method or METHODS)):
        begun = time.process_time()
        made = backtest(gram, methods=methods)
        print(f"{time.process_time() - begun:6.2f} s  {len(made.cells):4d} cells  {', '.join(methods) or 'usual ways'}")


if __name__ == "__main__":
    main()
