"""How much of what a prediction adds to the base survives the rounding to its stored precision.

A number of 8 significant bits moves by steps of 1/256 of itself: what is smaller is lost, and what training has added
by the window's end is often smaller. The last observed copy is then handicapped, and a far candidate is not.

The share is <rounded, delta> / |delta|² with delta before rounding and `rounded` what is left of it: 0 where nothing
survives, about 1 where rounding is only noise. Shape suffix: N = elements of a chunk.
"""

from collections.abc import Sequence
from functools import partial

import torch

from relex.forecast import Forecast
from relex.output.combine import chunks, needed_rows, predicted
from relex.output.shards import output_tensors
from relex.streaming import CHUNK, Unit, Workspace, in_order, workspaces
from relex.trajectory import Trajectory

# Below it a reader is warned.
LEAST = 0.9
# Of so many elements of each tensor it is told: of fewer than a chunk, so that it takes no more memory than writing.
_SAMPLE = CHUNK // 4


def surviving(
    trajectory: Trajectory, forecasts: Sequence[Forecast], *, memory: int, threads: int
) -> list[float | None]:
    """Return the share of each forecast's delta that survives; None where none is stored coarser than fp32, or moves.

    Told from the first elements of each tensor, read within `memory` bytes.
    """
    stored = [
        {tensor.name: tensor.dtype for tensor in output_tensors(trajectory, each.dtype, None)} for each in forecasts
    ]
    pieces = [
        Unit(index, 0, min(_SAMPLE, spec.count))
        for index, spec in enumerate(trajectory.tensors)
        if spec.moves and any(_is_coarse(dtypes[spec.stored.name]) for dtypes in stored)
    ]
    if not pieces:
        return [None] * len(forecasts)
    most = max(len(_rows(trajectory, forecasts, unit)) for unit in pieces)
    spaces = workspaces(trajectory, most, memory=memory, threads=threads, extra=2 * CHUNK * 8)
    sums = torch.zeros(len(forecasts), 2, dtype=torch.float64)
    for _, part in in_order(partial(_sums, trajectory, forecasts, stored), pieces, spaces):
        sums += part
    return [float(left / whole) if whole > 0 else None for left, whole in sums]


def warning(share: float | None, forecast: Forecast) -> str:
    """Return one line about a share that is too small, or nothing."""
    if share is None or share >= LEAST:
        return ""
    return (
        f"{forecast.method} @ {forecast.target_step}: {100 * share:.0f} % of what it adds to the base survives rounding"
        " to the stored precision. Nearer predictions, and the last observed copy, lose more than far ones: store"
        " predictions in float32 (output_dtype in relex.yaml, --dtype)."
    )


def _is_coarse(dtype: torch.dtype) -> bool:
    return torch.finfo(dtype).eps > torch.finfo(torch.float32).eps


def _rows(trajectory: Trajectory, forecasts: Sequence[Forecast], unit: Unit) -> list[int]:
    spec = trajectory.tensors[unit.tensor]
    needed = [needed_rows(forecast.tensors[spec.name], len(spec.entries)) for forecast in forecasts]
    return sorted({row for rows in needed for row in rows})


def _sums(
    trajectory: Trajectory,
    forecasts: Sequence[Forecast],
    stored: Sequence[dict[str, torch.dtype]],
    space: Workspace,
    unit: Unit,
) -> torch.Tensor:
    spec = trajectory.tensors[unit.tensor]
    sums = torch.zeros(len(forecasts), 2, dtype=torch.float64)
    tensors = [forecast.tensors[spec.name] for forecast in forecasts]
    rows = _rows(trajectory, forecasts, unit)
    for block in space.blocks(trajectory, unit, rows):
        for place, deltas in chunks(space, block, spec):
            base_N = block.base[place]
            for number, tensor in enumerate(tensors):
                dtype = stored[number][spec.stored.name]
                if tensor.source == "base" or not _is_coarse(dtype):
                    continue
                vectors = forecasts[number].vectors.get(spec.name)
                start = block.start + place.start
                added = vectors.elements(start, start + len(base_N), dtype=deltas.dtype) if vectors else None
                copies = None if spec.relative else block.stored[:, place]
                made_N = predicted(tensor, rows, base_N, stored=copies, deltas=deltas, added=added)
                delta_N = made_N.double() - base_N.double()
                left_N = made_N.to(dtype).double() - base_N.double()
                sums[number] += torch.stack([left_N @ delta_N, delta_N @ delta_N])
    return sums
