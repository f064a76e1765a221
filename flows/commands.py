"""What `relex inspect` and `relex extrapolate` do, without a word about how it is shown."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from flows.tables import Bars
from relex import manifest, spectrum
from relex.errors import TargetError
from relex.forecast import check_target, forecast
from relex.gram import Gram, cached
from relex.layouts import hf
from relex.manifest import Manifest
from relex.materialise import Output, materialise
from relex.predictors import parse_method
from relex.store import State, observed, open_base, scan
from relex.trajectory import Trajectory, open_trajectory

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def inspection(
    run: Path, base: Path, *, window: int | None, memory: int, threads: int, cache: Path, progress: Bars
) -> dict[str, Any]:
    """Return what is in a training run, as plain JSON: steps with state and delta norm, energy and R²."""
    opened = open_base(base)
    stored = scan(run, opened, now=time.time())
    rows: list[dict[str, Any]] = [
        {"step": item.step, "state": item.state.value, "path": str(item.path), "reason": item.reason} for item in stored
    ]
    found: dict[str, Any] = {
        "run": str(run),
        "base": str(base),
        "layout": hf.NAME,
        "tensors": len(opened.tensors),
        "parameters": sum(entry.nbytes // entry.dtype.itemsize for entry in opened.tensors.values()),
        "steps": rows,
    }
    ready = [item for item in stored if item.state is State.READY and (window is None or item.step <= window)]
    if len(ready) < 2:
        return found
    trajectory = open_trajectory(opened, observed(ready, run))
    with progress:
        gram = _measure(trajectory, cache, memory=memory, threads=threads, progress=progress)
    steps_K = torch.tensor(trajectory.steps, dtype=torch.float64)
    energy_T = spectrum.energy(gram.products)
    r_squared_T = spectrum.r_squared(gram.products, steps_K)
    weight_T = gram.products.diagonal(dim1=-2, dim2=-1).sum(-1)
    weight_T = weight_T / weight_T.sum().clamp(min=1e-300)
    norms = gram.products.diagonal(dim1=-2, dim2=-1).sum(0).sqrt() / gram.base_norms.sum().sqrt()
    for row in rows:
        if row["step"] in trajectory.steps:
            row["relative_delta"] = float(norms[trajectory.steps.index(row["step"])])
    found["energy"] = float(weight_T @ energy_T)
    found["r_squared"] = float(weight_T @ r_squared_T)
    found["by_tensor"] = {
        name: {"energy": float(energy_T[index]), "r_squared": float(r_squared_T[index])}
        for index, name in enumerate(gram.names)
    }
    return found


def extrapolation(
    run: Path,
    base: Path,
    *,
    targets: Sequence[int],
    out: Path,
    window: int | None,
    method: str,
    memory: int,
    threads: int,
    dtype: str | None,
    inside: Literal["refuse", "allow"],
    cache: Path,
    command: Sequence[str],
    progress: Bars,
) -> dict[Path, Manifest]:
    """Predict every target in one pass and return the manifests by directory."""
    parsed = parse_method(method)
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"dtype {dtype!r} is not known; known are {', '.join(DTYPES)}.")
    opened = open_base(base)
    trajectory = open_trajectory(opened, observed(scan(run, opened, now=time.time()), run, window=window))
    for target in targets:
        check_target(target, trajectory.steps, inside=inside)
    with progress:
        gram = _measure(trajectory, cache, memory=memory, threads=threads, progress=progress)
        outputs = [
            Output(
                forecast(
                    trajectory, gram, parsed, target_step=target, dtype=DTYPES[dtype] if dtype is not None else None
                ),
                out / f"step-{target}",
            )
            for target in targets
        ]
        materialise(
            trajectory,
            outputs,
            memory=memory,
            threads=threads,
            command=command,
            on_progress=lambda done, total: progress("writing", done, total),
        )
    return {output.directory: manifest.read(output.directory) for output in outputs}


def _measure(trajectory: Trajectory, cache: Path, *, memory: int, threads: int, progress: Bars) -> Gram:
    return cached(
        trajectory,
        cache / "grams",
        memory=memory,
        threads=threads,
        on_progress=lambda done, total: progress("reading", done, total),
    )
