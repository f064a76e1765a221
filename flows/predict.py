"""From the observed steps of one window to candidate model directories, in one pass for all methods and targets."""

import time
from collections.abc import Sequence

from flows.decision import Model
from flows.errors import WindowError
from flows.ledger import known, read_ledger, segment
from flows.settings import Settings
from flows.window import window_directory, window_key
from relex.extrapolation import Request, Tell, extrapolate
from relex.forecast import check_target
from relex.layouts.block_cache import BlockCache
from relex.predictors import parse_method
from relex.store import observed, open_base, scan
from relex.trajectory import open_trajectory


def predict(
    settings: Settings,
    steps: Sequence[int],
    key: str,
    *,
    blocks: BlockCache | None = None,
    tell: Tell | None = None,
) -> tuple[list[Model], tuple[str, ...]]:
    """Return the last observed checkpoint and every candidate, and what looks wrong in the window.

    The models are directories that are there when this returns. The last observed checkpoint is copied too: the trainer
    may prune it, and its copy has the base's tokenizer and precision like the candidates. Raises WindowError when the
    store no longer holds what the window was announced with, and RelexError.
    """
    base = open_base(settings.base, blocks=blocks)
    now = time.time()
    stored = scan(settings.store, base, now=now, blocks=blocks)
    stored = segment(stored, known(stored, read_ledger(settings), now=now))
    inside = [item for item in stored if item.step <= settings.window]
    found = window_key(settings, base, inside)
    if found != key:
        raise WindowError(
            f"window {key} was announced with steps {list(steps)}, the store and the settings now make it {found} with"
            f" steps {[item.step for item in inside]}. The watcher announces that one; nothing is left to do here."
        )
    trajectory = open_trajectory(base, observed(stored, settings.store, window=settings.window))
    directory = window_directory(settings, key) / "models"
    last = trajectory.steps[-1]
    requests = [Request(parse_method("hold"), last, directory / "observed" / f"step-{last}")]
    for method in map(parse_method, settings.methods):
        for target in settings.targets:
            check_target(target, trajectory.steps)
            requests.append(Request(method, target, directory / method.directory / f"step-{target}"))
    forecasts = extrapolate(
        trajectory,
        requests,
        grams=settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
        tell=tell,
    )
    models = [Model("observed", last, str(requests[0].directory))]
    for request, made in list(zip(requests, forecasts, strict=True))[1:]:
        models.append(Model("candidate", request.target_step, str(request.directory), request.method.spec, made.digest))
    return models, forecasts[0].warnings
