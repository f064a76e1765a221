"""The inner loops in C, where they were built and the CPU has them: reads, products of increments, a prediction's sum.

They are an option: without them the same is computed by torch and BLAS. The sum has the same bits in both. Products of
large tensors are not the same: here they are fp32 with fp64 sums across every 512 columns, there fp64 throughout. What
differs is below 1e-8 of the norms (1e-7 of fp32 checkpoints), and the manifest says which one it was.

Shape suffixes: R = checkpoints, N = elements, K = checkpoints padded as the caller wants them.
"""

import os
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

try:
    from relex import _kernel
except ImportError:
    BUILT = False
else:
    # One that is left from other sources is passed over.
    BUILT = _kernel.VERSION == 3

Suspects = list[tuple[int, int]]
"""(row, number of the stretch) of what may have lost a sector."""

# Tensors of fewer elements are multiplied in fp64: it costs nothing, and of few products the errors do not cancel.
FEWEST: Final = 1 << 18
# As the C code looks at a tensor for zeros: in stretches of so many elements.
STRETCH: Final = 1 << 15
# What the loops read and write.
DTYPES: Final = {torch.bfloat16: 0, torch.float32: 1}


@dataclass(frozen=True)
class Rows:
    """One stretch of a base and of checkpoints as the loops take it: bf16 or fp32, rows (R, N) with any stride.

    `base` is what is subtracted, rounded as the checkpoints are; None where they hold deltas already.
    """

    base: Tensor | None
    rows: Tensor


def read(pieces_4P: NDArray[np.int64], buffer: memoryview) -> bool:
    """Read pieces of open files into a buffer; return whether all of them are there.

    A column has the descriptor, the position in the file, the place in the buffer and the number of bytes. Without the
    loops in C it is done one after the other.
    """
    if BUILT:
        return _kernel.read(buffer, *pieces_4P)
    try:
        return all(
            os.preadv(descriptor, [buffer[place : place + length]], position) == length
            for descriptor, position, place, length in pieces_4P.T.tolist()
        )
    except OSError:
        return False


def gram(
    given: Rows, base: Tensor, *, first: int, total: Tensor, scratch: Tensor
) -> tuple[float, list[tuple[int, int]]]:
    """Add the products of increments from row `first` on to the lower triangle of `total`, (K, K) fp64.

    Returns the squared norm of `base`, and what may have lost a sector.
    """
    rows = given.rows
    count, n = rows.shape
    stored = base if base.dtype in DTYPES else base.float()
    if scratch.numel() < _kernel.scratch(count) or len(total) < count:
        raise ValueError(f"there is no room for the products of {count} rows")
    return _kernel.gram(
        _address(rows[0] if given.base is None else given.base, n),
        _address(stored, n),
        DTYPES[stored.dtype],
        _address(rows, n),
        rows.stride(0) * rows.itemsize,
        count,
        n,
        DTYPES[rows.dtype],
        given.base is None,
        first,
        _address(total, count),
        total.shape[1],
        _address(scratch, 1),
    )


def scratch(count: int) -> int:
    """Return the bytes of scratch that `gram` takes for so many checkpoints."""
    return _kernel.scratch(count) if BUILT else 0


def combine(given: Rows, base: Tensor, *, coefficients: Tensor, out: Tensor) -> bool:
    """Write base + sum of coefficients (R,) times deltas to `out` (N,), rounded once; return whether it is finite.

    `out` is bf16 or fp32.
    """
    rows = given.rows
    count, n = rows.shape
    added = base if base.dtype in DTYPES else base.float()
    return _kernel.combine(
        _address(rows[0] if given.base is None else given.base, n),
        _address(added, n),
        DTYPES[added.dtype],
        _address(rows, n),
        rows.stride(0) * rows.itemsize,
        count,
        n,
        DTYPES[rows.dtype],
        given.base is None,
        _address(coefficients, count),
        _address(out, n),
        DTYPES[out.dtype],
    )


def _address(tensor: Tensor, width: int) -> int:
    """Return where a tensor begins that holds `width` elements a row without gaps."""
    if tensor.shape[-1] < width or tensor.stride(-1) != 1:
        raise ValueError(f"{width} elements do not lie side by side in a tensor of {list(tensor.shape)}")
    return tensor.data_ptr()
