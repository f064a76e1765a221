"""What of a relex.yaml would stop or spoil a decision, told before anything is started for it."""

import math
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from evaluation.benchmarks.benchmark import resolve_benchmark
from evaluation.benchmarks.overlap import refuse_overlap
from evaluation.errors import EvaluationError
from flows.settings import Settings
from flows.state.snapshot import absences
from flows.state.windows import read_decisions
from relex.errors import RelexError
from relex.files.location import is_remote, open_directory
from relex.files.whole import FULL
from relex.layouts.named_base import foreign_base
from relex.layouts.planned import Planned, planned
from relex.layouts.pruning import warning
from relex.layouts.weights import Weights
from relex.sanity import holes
from relex.store import State, StoredCheckpoint, open_base, scan


@dataclass(frozen=True)
class Fault:
    """One line about one thing that is not as it should be.

    `refused` is what `relex up` does not start with, `waiting` what a watcher waits for, `warning` all else.
    """

    kind: Literal["refused", "waiting", "warning"]
    text: str


def check(settings: Settings) -> list[Fault]:
    """Return what is wrong with a training run's settings, and with what they name; nothing where all is well."""
    faults = list(_state(settings))
    # What the benchmarks' problems are is kept in the state directory.
    faults += _benchmarks(settings, kept=not faults)
    try:
        base, run = open_directory(settings.base), open_directory(settings.checkpoints)
        absent = absences(settings, base, run)
        faults += [Fault("waiting", f"waiting for {line}") for line in absent]
        plan = planned(run) if run.exists() else Planned()
        faults += _window(settings, plan)
        faults += _pin(settings)
        if pruned := warning(run, window=settings.end) if run.exists() and settings.pin == "none" else "":
            faults.append(Fault("warning", pruned))
        if not absent:
            opened = open_base(base)
            faults += _room(settings, opened, plan)
            faults += _checkpoints(scan(run, opened, now=time.time()))
    except (RelexError, OSError) as error:
        faults.append(Fault("waiting", f"waiting: {error}"))
    return faults


def clashes(configs: Mapping[Path, Settings]) -> list[str]:
    """Return a line for each directory of checkpoints, and each registered model, that two of the configs name."""
    lines = []
    for key, what in (("checkpoints", "read the checkpoints of"), ("registered_model", "register as")):
        named: dict[str, list[Path]] = {}
        for path, settings in configs.items():
            value = str(getattr(settings, key))
            named.setdefault(
                value if is_remote(value) or key != "checkpoints" else str(Path(value).resolve()), []
            ).append(path)
        lines += [
            f"{' and '.join(map(str, paths))} both {what} {value}. Is that meant?"
            for value, paths in named.items()
            if len(paths) > 1
        ]
    return lines


def _state(settings: Settings) -> Iterator[Fault]:
    """Write a file where the state is kept: no bit of a mode says of every file system that this can be done."""
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=settings.home) as file:
            file.write(b"\0")
    except OSError as error:
        if error.errno in FULL:
            yield Fault("waiting", f"waiting for room in {settings.state}: {error.strerror}")
            return
        yield Fault(
            "refused",
            f"state {settings.state} cannot be written ({error.strerror}). Give state: a directory of your own.",
        )


def _benchmarks(settings: Settings, *, kept: bool) -> Iterator[Fault]:
    readable = kept
    for key, benchmark in (
        ("selection", settings.selection),
        ("gate", settings.gate),
        *(("guards", each) for each in settings.guards),
        *(("report", each) for each in settings.report),
    ):
        try:
            resolve_benchmark(benchmark)
        except EvaluationError as error:
            readable = readable and key == "report"
            yield Fault("refused", f"{key}: {error}")
    if not readable:
        return
    try:
        refuse_overlap(settings.selection, settings.gate, cache=settings.home / "evaluations")
        for guard in settings.guards:
            refuse_overlap(settings.selection, guard, judge="guard", cache=settings.home / "evaluations")
    except (EvaluationError, OSError) as error:
        yield Fault("refused", str(error))


def _window(settings: Settings, plan: Planned) -> Iterator[Fault]:
    """Compare the window with the steps that are there and with the end of the run."""
    end = settings.end
    if plan.max_steps is not None and plan.max_steps < end:
        yield Fault(
            "warning",
            f"window {end} is beyond the run, which ends at step {plan.max_steps}: nothing would ever be decided. Give"
            " a smaller one.",
        )
    if not plan.steps or any(decision.window <= end for decision in read_decisions(settings)):
        # What was decided on may go.
        return
    kept = planned(open_directory(str(settings.pins))).steps if settings.pins.is_dir() else ()
    steps = sorted({*plan.steps, *kept})
    inside = [step for step in steps if step <= end]
    if steps[-1] >= end and len(inside) < 2:
        there = f"step {inside[0]} alone" if inside else "none"
        yield Fault(
            "warning",
            f"window {end} needs two checkpoints, and of those up to step {end} {there} is there: the run is at step"
            f" {steps[-1]}, and they are pruned. Start the run anew with pin: link, or widen the window.",
        )
        return
    if plan.spacing is not None and steps[0] > (plan.save_steps or 2 * plan.spacing):
        yield Fault(
            "warning",
            f"window {end}: checkpoints are {plan.spacing} steps apart, and the first that is there is of step"
            f" {steps[0]}: those before it are pruned, and a decision is made without them.",
        )
        return
    yield from (Fault("warning", hole.text) for hole in holes([0, *inside]))


def _pin(settings: Settings) -> Iterator[Fault]:
    run = Path(settings.checkpoints)
    both = settings.pin == "link" and run.is_dir() and settings.home.is_dir()
    if both and run.stat().st_dev != settings.home.stat().st_dev:
        yield Fault(
            "refused",
            f"pin: link cannot work: {run} and state {settings.state} are on two file systems. Set pin: copy, or state:"
            " to a directory beside the checkpoints.",
        )


def _room(settings: Settings, base: Weights, plan: Planned) -> Iterator[Fault]:
    """Compare the room there is with the models that a decision writes, and the checkpoints that are kept for it."""
    size = sum(math.prod(entry.shape) * entry.dtype.itemsize for entry in base.tensors.values())
    pinned = 0 if settings.pin == "none" or plan.spacing is None else settings.end // plan.spacing
    rungs = 1 if settings.targets == "auto" else len(settings.targets)
    predicted = 1 + rungs * (1 if settings.methods == "auto" else len(settings.methods))
    place = next(parent for parent in (settings.home, *settings.home.parents) if parent.is_dir())
    free = shutil.disk_usage(place).free
    if free < (pinned + predicted) * size:
        kept = f" and {pinned} checkpoints of the window" if pinned else ""
        yield Fault(
            "warning",
            f"{place} has room for {free} bytes, and {predicted} models that a decision writes{kept} of {size} bytes"
            f" take {(pinned + predicted) * size}. Make room, or set state: to another disk.",
        )


def _checkpoints(stored: tuple[StoredCheckpoint, ...]) -> Iterator[Fault]:
    broken = [checkpoint for checkpoint in stored if checkpoint.state is State.BROKEN]
    if broken:
        # A wrong base breaks them all in one way.
        more = f" ({len(broken) - 1} more are broken)" if len(broken) > 1 else ""
        yield Fault("waiting", f"step {broken[0].step} is broken: {broken[0].reason}{more}")
    warning = foreign_base([checkpoint.weights for checkpoint in stored if checkpoint.weights is not None])
    if warning:
        yield Fault("warning", warning)
