"""A real checkpoint as a model directory: in the base's precision, with its tokenizer, as predictions are."""

from dataclasses import replace
from pathlib import Path

from flows.errors import ObservedError
from flows.settings import Settings
from flows.state.decision import Model
from flows.state.snapshot import Snapshot
from relex.drift import OBSERVED, write_as_predicted
from relex.files.location import is_remote
from relex.layouts.weights import Weights
from relex.output import manifest
from relex.store import Checkpoint


def find(settings: Settings, run: Snapshot, location: str) -> Checkpoint:
    """Return the checkpoint that is called `location`; ObservedError where the run has none there that is complete."""
    wanted = _place(location)
    for stored in run.stored:
        if _place(str(stored.directory)) == wanted:
            if stored.weights is None:
                raise ObservedError(f"{location} is {stored.state}: {stored.reason}")
            return Checkpoint(stored.step, stored.weights)
    names = [stored.directory.name for stored in run.stored]
    there = names[0] if len(names) == 1 else f"{len(names)}, {names[0]} to {names[-1]}" if names else "none"
    raise ObservedError(f"{location} is no checkpoint of {settings.checkpoints}, which has {there}.")


def _place(location: str) -> str:
    """Return what all ways of writing a location have in common: a local path without links and relative parts."""
    return location.rstrip("/") if is_remote(location) else str(Path(location).expanduser().resolve())


def write(settings: Settings, base: Weights, checkpoint: Checkpoint, place: Path) -> Model:
    """Write the checkpoint below `place`, unless it is there, and return its model."""
    directory = place / f"step-{checkpoint.step}"
    write_as_predicted(
        base,
        checkpoint,
        directory,
        memory=int(settings.memory),
        threads=settings.threads,
        dtype=settings.output_dtype,
    )
    return Model("candidate", checkpoint.step, str(directory), OBSERVED, manifest.read(directory).digest)


def write_observed(settings: Settings, base: Weights, checkpoint: Checkpoint, place: Path) -> Model:
    """Write the checkpoint as `write` does, and return it as what was observed, which predictions are compared with."""
    return replace(write(settings, base, checkpoint, place), role="observed", method="")
