"""A decided tiny training run that may be stopped, as its files."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from evaluation.verdict.gate import Gate
from flows.settings import Settings, load_settings
from flows.state.decision import Backtested, Decision, Model
from flows.state.finished import Finished, keep_finished
from flows.state.records import write_json
from flows.state.windows import decision_path, window_key
from relex.store import open_base, scan

# A line of its own for each time it runs.
COMMAND = 'echo "$RELEX_TRAINING_RUN $RELEX_WINDOW $RELEX_TARGET_STEP $RELEX_MODEL $RELEX_REGISTERED" >> stopped'


def decided(config: Path, *, at_least: float | None = 0.985, **changes: Any) -> Decision:
    """Write the decision of a window of `config` that registered step 200, or as `changes` say, and return it.

    The winner is right on .994 of 500 gate problems, and on `at_least` of all of them for sure.
    """
    settings = load_settings(config)
    base, window = open_base(settings.base), changes.get("window", 40)
    stored = scan(settings.checkpoints, base, now=time.time())
    model = Model("candidate", 200, "models/relex/step-200", "relex", "d1", skill_at_least=0.4)
    gate = Gate("relex @ 200", "last observed @ 40", "sums", 500, 0.994, 0.6, 0.394, 0.35, 0.95, 0.0, "Tango", "passed")
    gate = replace(gate, candidate_at_least=at_least)
    registered: dict[str, Any] = {
        "training_run": settings.training_run,
        "key": window_key(settings, base, [checkpoint for checkpoint in stored if checkpoint.step <= window]),
        "window": window,
        "steps": (10, 20, 25, 40),
        "verdict": "registered",
        "reason": "it is better: passed.",
        "winner": model,
        "registered": "tiny-candidates version 1",
        "backtested": Backtested("trusted", (25, 40), "relex", 360.0, 0.5, 0.4, 78, ""),
        "gates": (gate,),
    }
    decision = Decision(**(registered | changes))
    write_json(decision_path(settings, decision.key), decision.to_json())
    return decision


def recorded(settings: Settings, count: int, *, points: float = 3.0, costs: Sequence[float] = ()) -> None:
    """Keep `count` finished runs that the ceiling would have stopped at `points`; those of `costs` lost so many."""
    for number in range(count):
        cost = costs[number] if number < len(costs) else 0.5
        other = settings.model_copy(update={"training_run": f"other-{number}"})
        rules = {"ceiling": points, "growth": points}
        keep_finished(other, [Finished(other.training_run, "k", 40, 200, "sums", 500, 0.95, 0.95 + cost / 100, rules)])


def configure(config: Path, **changes: Any) -> Settings:
    """Change keys of a relex.yaml; None takes one out."""
    content = yaml.safe_load(config.read_text()) | changes
    config.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return load_settings(config)


def runs(config: Path) -> list[str]:
    """Return what COMMAND wrote, a line a run."""
    path = config.parent / "stopped"
    return path.read_text().splitlines() if path.is_file() else []
