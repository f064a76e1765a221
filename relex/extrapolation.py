"""From a trajectory to predicted model directories: one pass for the Gram, one for all predictions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from relex import manifest, sanity
from relex.errors import TargetError
from relex.forecast import Forecast, check_target, forecast
from relex.gram import cached
from relex.manifest import Manifest
from relex.materialise import Output, materialise
from relex.predictors import Method
from relex.store import observed, open_base, scan
from relex.trajectory import Trajectory, open_trajectory

DTYPES = ("float32", "float16", "bfloat16")

Tell = Callable[[str, int, int], None]
"""Called with (what is being done, how much of it is done, how much there is)."""


@dataclass(frozen=True)
class Request:
    """One prediction that is wanted: by which method, at which training step, in which directory."""

    method: Method
    target_step: int
    directory: Path


def extrapolate(
    trajectory: Trajectory,
    requests: Sequence[Request],
    *,
    grams: Path,
    memory: int,
    threads: int,
    dtype: str | None = None,
    command: Sequence[str] = (),
    tell: Tell | None = None,
) -> list[Forecast]:
    """Write every requested model that is not there yet and return the forecasts, in the order of the requests.

    `grams` is the directory of measured Grams, `memory` a budget in bytes, `dtype` the precision of the result (None:
    the base's), `command` what the manifest says asked for it. Raises RelexError; then no new output is left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"dtype {dtype!r} is not known; known are {', '.join(DTYPES)}.")
    gram = cached(trajectory, grams, memory=memory, threads=threads, on_progress=_telling(tell, "reading"))
    sanity.refuse_duplicates(gram)
    forecasts = [
        forecast(trajectory, gram, request.method, target_step=request.target_step, dtype=dtype) for request in requests
    ]
    materialise(
        trajectory,
        [Output(made, request.directory) for made, request in zip(forecasts, requests, strict=True)],
        memory=memory,
        threads=threads,
        command=command,
        on_progress=_telling(tell, "writing"),
    )
    return forecasts


def extrapolate_run(
    run: str | Path,
    base: str | Path,
    *,
    targets: Sequence[int],
    out: Path,
    window: int | None = None,
    method: Method,
    memory: int,
    threads: int,
    dtype: str | None = None,
    inside: Literal["refuse", "allow"] = "refuse",
    grams: Path,
    command: Sequence[str] = (),
    tell: Tell | None = None,
) -> dict[Path, Manifest]:
    """Predict the checkpoints of a training run at `targets` into `out`/step-N and return the manifests by directory.

    Observed are the complete checkpoints at steps up to `window` (None: all). Raises RelexError, also for a target that
    is not beyond them unless `inside` says "allow".
    """
    opened = open_base(base)
    trajectory = open_trajectory(opened, observed(scan(run, opened, now=time.time()), run, window=window))
    for target in targets:
        check_target(target, trajectory.steps, inside=inside)
    requests = [Request(method, target, out / f"step-{target}") for target in targets]
    extrapolate(
        trajectory,
        requests,
        grams=grams,
        memory=memory,
        threads=threads,
        dtype=dtype,
        command=command,
        tell=tell,
    )
    return {request.directory: manifest.read(request.directory) for request in requests}


def _telling(tell: Tell | None, what: str) -> Callable[[int, int], None] | None:
    return None if tell is None else lambda done, total: tell(what, done, total)
