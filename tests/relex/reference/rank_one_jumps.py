"""The errors of a jump along the leading direction, told from that direction alone: no coefficient is multiplied out.

With u the leading eigenvector of a window's Gram and U = sum_k u_k delta_k, the line rebuilt from the base predicts
(mean(u) + (s* - mean(s)) uᵀg) U and the pinned one delta_K + damping (s* - s_K) (uᵀg) U, g the slope weights. One Gram
at a time, numpy only: nothing here is shared with what it is compared to.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def errors(
    gram_KK: Array, steps: Sequence[int], rows: Sequence[int], target: int, damping: float | None
) -> dict[str, float]:
    """Return the errors of one jump from the window `rows` to the checkpoint in row `target`; None: from the base."""
    last = rows[-1]
    steps_W = np.array([steps[row] for row in rows], dtype=np.float64)
    values_W, vectors_WW = np.linalg.eigh(gram_KK[np.ix_(rows, rows)])
    u_W, square = vectors_WW[:, -1], max(0.0, float(values_W[-1]))
    along_K = u_W @ gram_KK[rows]
    centred_W = steps_W - steps_W.mean()
    slope = float(u_W @ centred_W / (centred_W @ centred_W))
    if damping is None:
        scale = float(u_W.mean()) + (steps[target] - float(steps_W.mean())) * slope
        inner, predicted = scale * float(along_K[target]), scale**2 * square
    else:
        scale = damping * (steps[target] - steps[last]) * slope
        inner = float(gram_KK[last, target]) + scale * float(along_K[target])
        predicted = float(gram_KK[last, last]) + 2.0 * scale * float(along_K[last]) + scale**2 * square
    real = float(gram_KK[target, target])
    return {
        "missed": max(0.0, predicted - 2.0 * inner + real),
        "held": max(0.0, float(gram_KK[last, last]) - 2.0 * float(gram_KK[last, target]) + real),
        "inner": inner,
        "predicted": predicted,
        "real": real,
    }
