"""One chunk of one predicted tensor: coefficients times deltas on the base, a rank-one matrix, or a copy.

The sum is taken checkpoint by checkpoint, in step order: its bits then do not depend on what else is combined at once.
Shape suffixes: R = checkpoints that were read, N = elements of the chunk.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from relex.forecast import TensorForecast
from relex.streaming import Block, Workspace
from relex.trajectory import TensorSpec


def needed_rows(forecast: TensorForecast, count: int) -> list[int]:
    """Return the numbers of the checkpoints, of `count`, that a tensor is made from."""
    if forecast.source == "latest":
        return [count - 1]
    return [row for row, value in enumerate(forecast.coefficients) if value != 0.0]


def predicted(
    forecast: TensorForecast,
    rows: Sequence[int],
    base: Tensor,
    *,
    stored: Tensor | None,
    deltas: Tensor,
    added: Tensor | None = None,
) -> Tensor:
    """Return one chunk (N,) of a predicted tensor, before its rounding.

    `stored` and `deltas` (R, N) are of the checkpoints numbered `rows`; `stored` is None where only deltas are stored.
    `added` (N,) is what is added to a rank-one tensor.
    """
    if forecast.source == "base":
        return base
    if forecast.source == "latest":
        return stored[-1].contiguous() if stored is not None else deltas[-1] + base.to(deltas.dtype)
    total = torch.zeros_like(base, dtype=deltas.dtype)
    for position, row in enumerate(rows):
        if forecast.coefficients[row] != 0.0:
            total.add_(deltas[position], alpha=forecast.coefficients[row])
    if added is not None:
        total.add_(added)
    return total.add_(base.to(total.dtype))


def chunks(space: Workspace, block: Block, spec: TensorSpec) -> Iterator[tuple[slice, Tensor]]:
    """Yield (place in the block, deltas) of one block; what does not move has none, and comes as it is stored."""
    if spec.moves:
        yield from space.subtract(block)
    else:
        yield slice(0, len(block.base)), block.stored
