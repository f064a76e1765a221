"""Rank-one matrices as two vectors: what the matrix methods add to a combination of checkpoints.

They are too large for a manifest and lie beside it in a file of their own, which no loader takes for weights.
Shape suffixes: M, N = rows and columns of the matrix (a vector has N = 1).
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FILE_NAME = "relex-vectors.npz"

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RankOne:
    """left rightᵀ, of fp32 (M,) and (N,); `inner` is its inner product with the delta that it is added to."""

    left_M: Array
    right_N: Array
    inner: float = 0.0

    @property
    def digest(self) -> str:
        """Hex digest of both vectors."""
        return sha256(_bytes(self.left_M) + _bytes(self.right_N)).hexdigest()

    @property
    def square(self) -> float:
        """The squared Frobenius norm."""
        left_M, right_N = self.left_M.astype(np.float64), self.right_N.astype(np.float64)
        return float((left_M @ left_M) * (right_N @ right_N))

    def scaled(self, factor: float) -> "RankOne":
        """Return the matrix times `factor`."""
        return RankOne((self.left_M * np.float64(factor)).astype(np.float32), self.right_N, self.inner * factor)

    def elements(self, start: int, stop: int, *, dtype: torch.dtype) -> Tensor:
        """Return elements `start` to `stop` of the flat matrix; their bits do not depend on how many are asked for."""
        columns = len(self.right_N)
        first, last = start // columns, -(-stop // columns)
        left_M, right_N = torch.from_numpy(self.left_M), torch.from_numpy(self.right_N)
        rows_MN = left_M[first:last, None].to(dtype) * right_N.to(dtype)
        return rows_MN.view(-1)[start - first * columns : stop - first * columns]


def to_bytes(vectors: Mapping[str, RankOne]) -> bytes:
    """Return the vectors of tensors by name as an npz file; equal vectors give equal bytes."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for name in sorted(vectors):
        matrix = vectors[name]
        arrays |= {
            f"{name}:left": matrix.left_M,
            f"{name}:right": matrix.right_N,
            f"{name}:inner": np.array(matrix.inner),
        }
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def from_bytes(content: bytes) -> dict[str, RankOne]:
    """Read back what `to_bytes` returned; raises ValueError, OSError, KeyError or BadZipFile for anything else."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        names = [key.removesuffix(":left") for key in file.files if key.endswith(":left")]
        return {
            name: RankOne(file[f"{name}:left"], file[f"{name}:right"], float(file[f"{name}:inner"])) for name in names
        }


def _bytes(array: Array) -> bytes:
    return f"{len(array)} ".encode() + array.astype("<f4").tobytes()
