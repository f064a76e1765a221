"""A decided tiny training run that may be stopped, as its files."""

import time
from pathlib import Path
from typing import Any

import yaml

from flows.settings import Settings, load_settings
from flows.state.decision import Backtested, Decision, Model
from flows.state.records import write_json
from flows.state.windows import decision_path, window_key
from relex.store import open_base, scan

# A line of its own for each time it runs.
COMMAND = 'echo "$RELEX_TRAINING_RUN $RELEX_WINDOW $RELEX_TARGET_STEP $RELEX_MODEL $RELEX_REGISTERED" >> stopped'


def decided(config: Path, *, trusted: int | None = 400, **changes: Any) -> Decision:
    """Write the decision of a window of `config` that registered step 200, or as `changes` say, and return it."""
    settings = load_settings(config)
    base, window = open_base(settings.base), changes.get("window", 40)
    stored = scan(settings.checkpoints, base, now=time.time())
    model = Model("candidate", 200, "models/relex/step-200", "relex", "d1", skill_at_least=0.4)
    registered: dict[str, Any] = {
        "training_run": settings.training_run,
        "key": window_key(settings, base, [item for item in stored if item.step <= window]),
        "window": window,
        "steps": (10, 20, 25, 40),
        "verdict": "registered",
        "reason": "it is better: passed.",
        "winner": model,
        "registered": "tiny-candidates version 1",
        "backtested": Backtested("trusted", (25, 40), "relex", 360.0, 0.5, 0.4, trusted, ""),
    }
    decision = Decision(**(registered | changes))
    write_json(decision_path(settings, decision.key), decision.to_json())
    return decision


def configure(config: Path, **changes: Any) -> Settings:
    """Change keys of a relex.yaml; None takes one out."""
    content = yaml.safe_load(config.read_text()) | changes
    config.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}))
    return load_settings(config)


def runs(config: Path) -> list[str]:
    """Return what COMMAND wrote, a line a run."""
    path = config.parent / "stopped"
    return path.read_text().splitlines() if path.is_file() else []
