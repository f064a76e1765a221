"""A real checkpoint through the gate of predictions into their registry.

It has to be no worse than the last observed checkpoint of the newest decision (where nothing was decided: better than
the base) and better than the champion. It is one look at the gate, as a decision is.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from deploy import registry
from deploy.registry import Registered
from evaluation.child import kept_children
from evaluation.verdict.gate import Gate
from flows.decide.gate_results import gate_results_path
from flows.decide.record import datasets
from flows.decide.stages import fetch_base, find_champion, gate_model
from flows.errors import ObservedError
from flows.observed.model import find, write
from flows.settings import Settings
from flows.state.decision import Model, gate_metrics
from flows.state.lock import held
from flows.state.snapshot import look_at
from flows.state.windows import read_decisions
from relex.files.block_cache import BlockCache


@dataclass(frozen=True)
class Registration:
    """A registered real checkpoint, and the comparisons that it passed."""

    step: int
    registered: Registered
    gates: tuple[Gate, ...]

    @property
    def sentence(self) -> str:
        """Return what it is in plain words."""
        done = self.registered
        was = "registered as" if done.created else "registered already as"
        return f"Real step {self.step} is {was} {done.name} version {done.version}."


@kept_children()
def register(settings: Settings, location: str, *, tracking_uri: str) -> Registration:
    """Gate the checkpoint that is called `location` and register it.

    ObservedError where it is no complete checkpoint of the run, where it is the champion already, where another process
    is registering one, and, with the comparison, where it does not pass. Raises RelexError, EvaluationError,
    DeployError.
    """
    place = settings.home / "observed"
    place.mkdir(parents=True, exist_ok=True)
    with (
        held(place / "claim.lock", seconds=2.0) as mine,
        BlockCache(settings.home, size=int(settings.cache)) as blocks,
    ):
        if not mine:
            raise ObservedError(f"another process registers a checkpoint of {settings.training_run}. Wait for it.")
        run = look_at(settings, settings.checkpoints, blocks=blocks)
        model = write(settings, run.base, find(settings, run, location), place)
        champions = find_champion(settings, tracking_uri)
        if any(champion.digest == model.digest for champion in champions):
            raise ObservedError(f"{location} is the champion of {settings.registered_model} already.")
        references = [reference(settings, model.step), *champions]
        comparisons = settings.attempts if settings.window == "auto" else 1
        gates = tuple(gate_model(settings, model, references, comparisons))
        failed = [each.sentence for each in gates if not each.passed]
        if failed:
            shutil.rmtree(model.directory)
            raise ObservedError(f"{location} is not registered. {' '.join(failed)}")
        done = registry.register(
            Path(model.directory),
            name=settings.registered_model,
            tracking_uri=tracking_uri,
            metrics=gate_metrics(gates),
            datasets=datasets(settings),
            tags=_tags(settings, model, gates),
            description=_description(settings, model, gates),
            gate_reports=[gate_results_path(settings, model)],
        )
        # The registry has the files now, by links where it can.
        shutil.rmtree(model.directory)
        return Registration(model.step, done, gates)


def reference(settings: Settings, step: int) -> Model:
    """Return the last observed checkpoint of the newest decision, other than `step` itself, else the base."""
    for decision in reversed(read_decisions(settings)):
        for score in decision.selection:
            seen = score.model
            if seen.role == "observed" and seen.step != step and Path(seen.directory).is_dir():
                return seen
    return fetch_base(settings)


def _tags(settings: Settings, model: Model, gates: tuple[Gate, ...]) -> dict[str, str]:
    return {
        "step": str(model.step),
        "method": model.method,
        "accuracy": f"{gates[0].candidate_accuracy:.4f}",
        "beat": ", ".join(f"{each.reference} by {100 * each.difference:+.2f} points" for each in gates),
        "verdict": "registered",
        "training_run": settings.training_run,
    }


def _description(settings: Settings, model: Model, gates: tuple[Gate, ...]) -> str:
    return (
        f"**registered**: {' '.join(each.sentence for each in gates)}\n\nThe weights of training run"
        f" `{settings.checkpoints}` as they were trained, at step {model.step}, on base `{settings.base}`. Nothing is"
        " predicted."
    )
