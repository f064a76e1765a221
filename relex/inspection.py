"""What is in the checkpoint store of a training run, and how straight its trajectory is.

Shape suffixes: T = tensors that move, K = checkpoints.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from relex import sanity, spectrum
from relex.files.block_cache import BlockCache
from relex.gram import cached
from relex.layouts.named_base import foreign_base
from relex.layouts.weights import Weights
from relex.sanity import Finding
from relex.store import State, observed, open_base, scan
from relex.trajectory import open_trajectory


@dataclass(frozen=True)
class Step:
    """One step directory; `relative_delta` is the norm of its delta over the base's, None where it was not measured.

    `layout` and `dtype` (the precisions it holds, the most common first) are empty unless it is ready.
    """

    step: int
    state: State
    location: str
    layout: str
    dtype: str
    reason: str
    relative_delta: float | None


@dataclass(frozen=True)
class Straightness:
    """Rank-1 energy, and R² of the leading coordinate's line in the step; both in 0..1."""

    energy: float
    r_squared: float


@dataclass(frozen=True)
class Inspection:
    """A training run as it is stored. The straightness is None while fewer than two checkpoints are ready."""

    run: str
    base: str
    tensors: int
    parameters: int
    steps: tuple[Step, ...]
    straightness: Straightness | None
    by_tensor: Mapping[str, Straightness]
    findings: tuple[Finding, ...]


def inspect(
    run: str | Path,
    base: str | Path,
    *,
    grams: Path,
    memory: int,
    threads: int,
    window: int | None = None,
    blocks: BlockCache | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Look at every step directory, and measure the ready ones up to `window` (None: all).

    `blocks` is where what is read from a URL is kept meanwhile.
    The straightness of the whole weighs every tensor by the size of its deltas. Raises RelexError.
    """
    opened = open_base(base, blocks=blocks)
    stored = scan(run, opened, now=time.time(), blocks=blocks)
    ready = [
        checkpoint
        for checkpoint in stored
        if checkpoint.state is State.READY and (window is None or checkpoint.step <= window)
    ]
    straightness: Straightness | None = None
    by_tensor: dict[str, Straightness] = {}
    deltas: dict[int, float] = {}
    findings: tuple[Finding, ...] = ()
    if len(ready) >= 2:
        trajectory = open_trajectory(opened, observed(ready, run))
        gram = cached(trajectory, grams, memory=memory, threads=threads, on_progress=on_progress)
        energy_T = spectrum.energy(gram.products)
        r_squared_T = spectrum.r_squared(gram.products, torch.tensor(trajectory.steps, dtype=torch.float64))
        straightness = Straightness(*(spectrum.pooled(gram.products, values) for values in (energy_T, r_squared_T)))
        pairs = zip(energy_T.tolist(), r_squared_T.tolist(), strict=True)
        by_tensor = {name: Straightness(*pair) for name, pair in zip(gram.names, pairs, strict=True)}
        norms_K = (gram.products.diagonal(dim1=-2, dim2=-1).sum(0) / gram.base_norms.sum()).sqrt()
        findings = tuple(sanity.findings(gram))
        deltas = dict(zip(trajectory.steps, norms_K.tolist(), strict=True))
    suspicion = foreign_base([checkpoint.weights for checkpoint in ready if checkpoint.weights is not None])
    if suspicion:
        findings = (*findings, Finding("base", ready[-1].step, "", suspicion))
    steps = tuple(
        Step(
            checkpoint.step,
            checkpoint.state,
            str(checkpoint.directory),
            checkpoint.weights.layout if checkpoint.weights is not None else "",
            _precisions(checkpoint.weights) if checkpoint.weights is not None else "",
            checkpoint.reason,
            deltas.get(checkpoint.step),
        )
        for checkpoint in stored
    )
    parameters = sum(math.prod(entry.shape) for entry in opened.tensors.values())
    return Inspection(str(run), str(base), len(opened.tensors), parameters, steps, straightness, by_tensor, findings)


def _precisions(weights: Weights) -> str:
    elements = Counter[torch.dtype]()
    for entry in weights.tensors.values():
        if entry.dtype.is_floating_point:
            elements[entry.dtype] += math.prod(entry.shape)
    return ", ".join(str(dtype).removeprefix("torch.") for dtype, _ in elements.most_common())
