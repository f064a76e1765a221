"""From the observed steps of one window to candidate model directories, in one pass for all methods and targets."""

import time
from collections.abc import Callable, Sequence

from flows.decision import Model
from flows.errors import WindowError
from flows.settings import Settings
from flows.window import window_directory, window_key
from relex.forecast import check_target, forecast
from relex.gram import cached
from relex.materialise import Output, materialise
from relex.predictors import parse_method
from relex.store import observed, open_base, scan
from relex.trajectory import open_trajectory


def predict(
    settings: Settings, steps: Sequence[int], key: str, *, on_progress: Callable[[str, int, int], None] | None = None
) -> list[Model]:
    """Return the last observed checkpoint and every candidate as model directories that are there when this returns.

    The last observed checkpoint is copied too: the trainer may prune it, and its copy has the base's tokenizer and
    precision like the candidates. Raises WindowError when the store no longer holds what the window was announced with,
    and RelexError.
    """
    base = open_base(settings.base)
    stored = scan(settings.checkpoints, base, now=time.time())
    inside = [item for item in stored if item.step <= settings.window]
    now = window_key(settings, base, inside)
    if now != key:
        raise WindowError(
            f"window {key} was announced with steps {list(steps)}, the store and the settings now make it {now} with"
            f" steps {[item.step for item in inside]}. The watcher announces that one; nothing is left to do here."
        )
    trajectory = open_trajectory(base, observed(stored, settings.checkpoints, window=settings.window))
    memory, threads = int(settings.memory), settings.threads
    grams = settings.home / "grams"
    gram = cached(trajectory, grams, memory=memory, threads=threads, on_progress=_named("reading", on_progress))
    directory = window_directory(settings, key) / "models"
    last = trajectory.steps[-1]
    holding = forecast(trajectory, gram, parse_method("hold"), target_step=last)
    outputs = [Output(holding, directory / "observed" / f"step-{last}")]
    models = [Model("observed", last, str(outputs[0].directory))]
    for spec in settings.methods:
        method = parse_method(spec)
        for target in settings.targets:
            check_target(target, trajectory.steps)
            prediction = forecast(trajectory, gram, method, target_step=target)
            place = directory / spec.replace(":", "-").replace(",", "-").replace("=", "") / f"step-{target}"
            outputs.append(Output(prediction, place))
            models.append(Model("candidate", target, str(place), method.spec, prediction.digest))
    materialise(trajectory, outputs, memory=memory, threads=threads, on_progress=_named("writing", on_progress))
    return models


def _named(what: str, report: Callable[[str, int, int], None] | None) -> Callable[[int, int], None] | None:
    if report is None:
        return None
    return lambda done, total: report(what, done, total)
