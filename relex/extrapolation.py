"""From a trajectory to predicted model directories: one pass for the Gram, one for all predictions."""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from relex import sanity
from relex.errors import ContentChangedError, TargetError
from relex.files.block_cache import BlockCache
from relex.files.location import is_remote
from relex.forecast import Forecast, check_target, forecast
from relex.gram import cached, forget
from relex.matrix_updates import added
from relex.output import manifest
from relex.output.adapter import adapter_digest, check_adapters, write_adapter
from relex.output.early import EarlyOutputs
from relex.output.manifest import Manifest
from relex.output.materialise import Output, materialise
from relex.output.rounding import surviving, warning
from relex.output.shards import Spread
from relex.output.upload import check_destination, discard_other, is_uploaded, staged, upload
from relex.predictors import Method
from relex.predictors.predictor import MatrixPredictor
from relex.progress import Tell, telling
from relex.trajectory import Trajectory, open_run

DTYPES = ("float32", "float16", "bfloat16")

Form = Literal["model", "adapter"]


@dataclass(frozen=True)
class Request:
    """One prediction that is wanted: by which method, at which training step, in which directory.

    With a `destination`, a URL, it is sent there.
    """

    method: Method
    target_step: int
    directory: Path
    destination: str = ""


def extrapolate(
    trajectory: Trajectory,
    requests: Sequence[Request],
    *,
    grams: Path,
    memory: int,
    threads: int,
    dtype: str | None = None,
    form: Form = "model",
    shard_size: int | None = None,
    spread: Spread | None = None,
    command: Sequence[str] = (),
    tell: Tell | None = None,
) -> list[Forecast]:
    """Write every requested model that is not there yet and return the forecasts, in the order of the requests.

    `grams` is the directory of measured Grams and of what matrix methods learnt, `memory` a budget in bytes, `dtype`
    the precision of the result (None: the base's), `form` whether it is a whole model or, of a run of adapters, an
    adapter, `command` what the manifest says asked for it. How a whole model is cut and who writes it: see
    `materialise`. Raises RelexError; then no new output is left behind.
    """
    if dtype is not None and dtype not in DTYPES:
        raise TargetError(f"dtype {dtype!r} is not known; known are {', '.join(DTYPES)}.")
    if form == "adapter":
        check_adapters(trajectory)
        if dtype is not None:
            raise TargetError(
                f"--dtype {dtype} says how a whole model is stored, and an adapter is not. Give one of the two."
            )
        for request in requests:
            if isinstance(request.method.predictor, MatrixPredictor):
                raise TargetError(
                    f"--adapter: what {request.method.name} predicts is no combination of adapters. Leave out --adapter"
                    " to get a whole model."
                )
    wanted = [(request.method, request.target_step, request.directory) for request in requests]
    early = EarlyOutputs(trajectory, wanted, dtype or "base", shard_size)
    with closing(early):
        gram = cached(
            trajectory,
            grams,
            memory=memory,
            threads=threads,
            beside=early if form == "model" and spread is None and _at_once(requests) else None,
            on_progress=telling(tell, "reading"),
        )
        sanity.refuse_duplicates(gram)
        requests = [
            replace(request, method=request.method.informed(trajectory, memory=memory, threads=threads))
            for request in requests
        ]
        vectors = added(
            trajectory,
            gram,
            [(request.method, request.target_step) for request in requests],
            directory=grams,
            memory=memory,
            threads=threads,
            on_progress=telling(tell, "learning"),
        )
        forecasts: list[Forecast] = []
        for request in requests:
            if tell is not None:
                tell("fitting", len(forecasts), len(requests))
            forecasts.append(
                forecast(
                    trajectory,
                    gram,
                    request.method,
                    target_step=request.target_step,
                    dtype=dtype,
                    added=next(vectors),
                )
            )
        if tell is not None:
            tell("fitting", len(requests), len(requests))
        if form == "model":
            shares = surviving(trajectory, forecasts, memory=memory, threads=threads)
            forecasts = [
                replace(made, surviving=share, warnings=(*made.warnings, *filter(None, [warning(share, made)])))
                for made, share in zip(forecasts, shares, strict=True)
            ]
        missing = []
        for made, request in zip(forecasts, requests, strict=True):
            digest = adapter_digest(made) if form == "adapter" else made.digest
            if request.destination and is_uploaded(request.destination, digest):
                continue
            if request.destination:
                discard_other(request.directory, digest)
            missing.append((made, request))
        begun = early.finished(forecasts, gram.contents)
    if begun and tell is not None:
        tell("writing", len(begun), len(begun))
    writing = telling(tell, "writing")
    try:
        if form == "adapter":
            for made, request in missing:
                write_adapter(
                    trajectory,
                    made,
                    request.directory,
                    contents=gram.contents,
                    memory=memory,
                    threads=threads,
                    command=command,
                    on_progress=writing,
                )
        else:
            materialise(
                trajectory,
                [Output(made, request.directory) for made, request in missing],
                contents=gram.contents,
                memory=memory,
                threads=threads,
                shard_size=shard_size,
                spread=spread,
                begun=begun,
                command=command,
                on_progress=writing,
            )
    except ContentChangedError:
        # Else the next call would take the products of the former bytes again.
        forget(trajectory, grams)
        raise
    for _, request in missing:
        if request.destination:
            upload(request.directory, request.destination)
    return forecasts


def _at_once(requests: Sequence[Request]) -> bool:
    """Whether they can be written tensor by tensor as the products come, where no other call has them already."""
    return all(request.method.predictor.by_tensor and not request.destination for request in requests)


def extrapolate_run(
    run: str | Path,
    base: str | Path,
    *,
    targets: Sequence[int],
    out: str | Path,
    window: int | None = None,
    method: Method,
    memory: int,
    threads: int,
    dtype: str | None = None,
    form: Form = "model",
    inside: Literal["refuse", "allow"] = "refuse",
    grams: Path,
    staging: Path,
    blocks: BlockCache | None = None,
    command: Sequence[str] = (),
    tell: Tell | None = None,
) -> dict[str, Manifest]:
    """Predict the checkpoints of a training run at `targets` into `out`/step-N and return the manifests by location.

    Observed are the complete checkpoints at steps up to `window` (None: all). `staging` is the directory where
    predictions lie until they are sent, when `out` is a URL; `blocks` is where what is read from a URL is kept
    meanwhile. Raises RelexError, also for a target that is not beyond them unless `inside` says "allow".
    """
    if is_remote(out):
        check_destination(str(out))
    trajectory = open_run(run, base, window=window, blocks=blocks)
    for target in targets:
        check_target(target, trajectory.steps, inside=inside)
    places = [f"{str(out).rstrip('/')}/step-{target}" for target in targets]
    with ExitStack() as stack:
        requests = [
            Request(method, target, stack.enter_context(staged(place, staging)), place)
            if is_remote(out)
            else Request(method, target, Path(place))
            for target, place in zip(targets, places, strict=True)
        ]
        extrapolate(
            trajectory,
            requests,
            grams=grams,
            memory=memory,
            threads=threads,
            dtype=dtype,
            form=form,
            command=command,
            tell=tell,
        )
    return {place: manifest.read(place) for place in places}
