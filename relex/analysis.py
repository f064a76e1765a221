"""How a run moves: how much of it is one direction, how straight it goes there, and where in the model.

Shape suffixes: T = tensors that move, K = checkpoints, R = rank.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from relex import sanity, spectrum
from relex.files.block_cache import BlockCache
from relex.gram import Gram, cached
from relex.linearity import Sample, squared_correlation, weight_r_squared
from relex.progress import Tell, telling
from relex.trajectory import Trajectory, open_run

# Coordinates that are shown: the first is the method, the others are what it leaves out.
RANK = 3
BINS = 50


@dataclass(frozen=True)
class Moments:
    """R² of many single values on the step: how many were looked at, how many move enough to tell, their quartiles.

    `counts` are of the kept ones in BINS equal bins of 0..1; quartiles are None when none was kept.
    """

    drawn: int
    kept: int
    quartiles: tuple[float, float, float] | None
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One tensor, or all of one type (see `place`), in one layer or all: numbers weighed by the squared deltas.

    `layer` is None outside the layers and for all of them together. `share` is its part of the whole run's squared
    deltas. `energy` (rank 1) and `r_squared` (of the leading coordinate on the step) are None where nothing moves.
    """

    name: str
    module: str
    layer: int | None
    tensors: int
    share: float
    energy: float | None
    r_squared: float | None
    weights: Moments


@dataclass(frozen=True)
class Analysis:
    """A run, its tensors, cells (module type by layer) and module types.

    `coordinates` are the RANK leading ones of the whole model by step, over the norm of the latest delta, each with its
    share of the energy in `energies`; `module_coordinates` are the leading one of each module type over its last value.
    """

    run: str
    base: str
    seed: int
    steps: tuple[int, ...]
    whole: Part
    tensors: tuple[Part, ...]
    cells: tuple[Part, ...]
    modules: tuple[Part, ...]
    energies: tuple[float, ...]
    coordinates: tuple[tuple[float, ...], ...]
    module_coordinates: Mapping[str, tuple[float, ...]]
    warnings: tuple[str, ...]


def analyze_run(
    run: str | Path,
    base: str | Path,
    *,
    grams: Path,
    memory: int,
    threads: int,
    window: int | None = None,
    seed: int = 0,
    blocks: BlockCache | None = None,
    tell: Tell | None = None,
) -> Analysis:
    """Read the complete checkpoints at steps up to `window` (None: all) and say how they move.

    They are read once for the Gram, unless it is in `grams`, and once for the sample of weights that `seed` draws.
    `blocks` is where what is read from a URL is kept meanwhile. Raises RelexError.
    """
    trajectory = open_run(run, base, window=window, blocks=blocks)
    gram = cached(trajectory, grams, memory=memory, threads=threads, on_progress=telling(tell, "reading"))
    samples = weight_r_squared(
        trajectory, seed=seed, memory=memory, threads=threads, on_progress=telling(tell, "sampling")
    )
    return analyze(trajectory, gram, samples, run=str(run), base=str(base), seed=seed)


def analyze(
    trajectory: Trajectory, gram: Gram, samples: Mapping[str, Sample], *, run: str, base: str, seed: int
) -> Analysis:
    """Put together what a Gram and a sample of the weights say."""
    steps_K = torch.tensor(trajectory.steps, dtype=torch.float64)
    energy_T, r_squared_T = spectrum.energy(gram.products), spectrum.r_squared(gram.products, steps_K)
    size_T = gram.products.diagonal(dim1=-2, dim2=-1).sum(-1)
    cells: dict[tuple[int | None, str], list[int]] = {}
    modules: dict[str, list[int]] = {}
    for index, name in enumerate(gram.names):
        module, layer = place(name)
        cells.setdefault((layer, module), []).append(index)
        modules.setdefault(module, []).append(index)

    def part(name: str, module: str, layer: int | None, members: Sequence[int]) -> Part:
        moved = float(size_T[members].sum()) > 0
        products = gram.products[members]
        return Part(
            name,
            module,
            layer,
            len(members),
            float(size_T[members].sum() / size_T.sum()) if moved else 0.0,
            spectrum.pooled(products, energy_T[members]) if moved else None,
            spectrum.pooled(products, r_squared_T[members]) if moved else None,
            _moments([samples[gram.names[i]] for i in members if gram.names[i] in samples]),
        )

    energies_R, coordinates_KR = _coordinates(gram.products.sum(0))
    latest = float(gram.products.sum(0)[-1, -1]) ** 0.5 or 1.0
    leading = {module: _coordinates(gram.products[members].sum(0))[1][:, 0] for module, members in modules.items()}
    return Analysis(
        run,
        base,
        seed,
        trajectory.steps,
        part("", "", None, list(range(len(gram.names)))),
        tuple(part(name, *place(name), [index]) for index, name in enumerate(gram.names)),
        tuple(part("", module, layer, members) for (layer, module), members in cells.items()),
        tuple(part("", module, None, members) for module, members in modules.items()),
        tuple(energies_R.tolist()),
        tuple(tuple(row.tolist()) for row in (coordinates_KR / latest).T),
        {module: tuple((row_K / row_K[-1]).tolist()) for module, row_K in leading.items() if float(row_K[-1]) != 0.0},
        tuple(finding.text for finding in sanity.findings(gram)),
    )


def place(name: str) -> tuple[str, int | None]:
    """Return the module type of a tensor and its layer, None outside the layers.

    The first number in the name is the layer; others, such as an expert's, are one type: `*`.
    """
    words = name.split(".")
    first = next((i for i, word in enumerate(words) if word.isdecimal()), None)
    tail = words[first + 1 :] if first is not None else words[1:] if words[0] == "model" and words[1:] else words
    if tail[-1:] == ["weight"] and len(tail) > 1:
        tail = tail[:-1]
    module = re.sub(r"(?<![^.])\d+(?![^.])", "*", ".".join(tail))
    return module, int(words[first]) if first is not None else None


def moments(drawn: int, values: NDArray[np.float64]) -> Moments:
    """Return what is kept of many R² values: `values` are those that move enough, of `drawn`."""
    quartiles = tuple(np.quantile(values, (0.25, 0.5, 0.75)).tolist()) if len(values) else None
    counts, _ = np.histogram(values, bins=BINS, range=(0.0, 1.0))
    return Moments(drawn, len(values), quartiles, tuple(counts.tolist()))


def series_moments(values: Sequence[Sequence[float]], steps: Sequence[int]) -> Moments:
    """Return R² on the step of many series, each (K,) a row: those that are constant are dropped."""
    values_NK = torch.tensor(values, dtype=torch.float64)
    found_N = squared_correlation(values_NK.T, torch.tensor(steps, dtype=torch.float64))
    return moments(len(values), found_N[found_N.isfinite()].numpy())


def _moments(samples: Sequence[Sample]) -> Moments:
    values = np.concatenate([sample.r_squared for sample in samples]) if samples else np.zeros(0)
    return moments(sum(sample.drawn for sample in samples), values)


def _coordinates(gram_KK: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (R,) shares of the energy and the (K, R) coordinates, leading first, each positive at the end."""
    values_K, vectors_KK = torch.linalg.eigh(gram_KK)
    values_R = values_K.clamp(min=0.0).flip(0)[:RANK]
    coordinates_KR = vectors_KK.flip(1)[:, :RANK] * values_R.sqrt()
    total = values_K.clamp(min=0.0).sum()
    return values_R / total if float(total) > 0 else values_R, coordinates_KR * torch.where(
        coordinates_KR[-1] < 0, -1.0, 1.0
    )
