"""One window is one decision: its name, its directory, who works on it, and what was decided.

Everything is a small file in the training run's state directory; the decision is written last.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from flows.settings import Settings
from flows.state.decision import Decision
from flows.state.lock import held
from flows.state.records import read_json

if TYPE_CHECKING:
    # torch comes with them, and whoever reads a decision needs no tensor.
    from relex.layouts.weights import Weights
    from relex.store import StoredCheckpoint


def window_key(settings: Settings, base: "Weights", inside: list["StoredCheckpoint"]) -> str:
    """Return the name of one decision: a digest of the observed files and of every setting that decides."""
    observed = {checkpoint.step: checkpoint.weights.identity for checkpoint in inside if checkpoint.weights is not None}
    return key_of(settings, base, observed)


def key_of(settings: Settings, base: "Weights", checkpoints: Mapping[int, str]) -> str:
    """Return the same name, told by the identity of each checkpoint's files."""
    deciding = ("training_run", "window", "targets", "total_steps", "methods", "attempts", "margin", "confidence")
    scoring = ("selection", "gate", "report", "registered_model", "dtype", "batch_size", "backend")
    content = {name: getattr(settings, name) for name in (*deciding, *scoring)}
    if settings.output_dtype is not None:
        # Only then: windows of earlier versions keep their names.
        content["output_dtype"] = settings.output_dtype
    if settings.score_every is not None:
        # How often does not matter: what is compared with may be another checkpoint all the time.
        content["best_observed"] = True
    if settings.guards:
        content["guards"] = settings.guards
    content["base"] = base.identity
    content["checkpoints"] = [[step, identity] for step, identity in sorted(checkpoints.items())]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def key_up_to(settings: Settings, base: "Weights", checkpoints: Mapping[int, str], end: int) -> str:
    """Return the name of the window of those checkpoints that are at steps up to `end`."""
    return key_of(settings, base, {step: identity for step, identity in checkpoints.items() if step <= end})


def window_directory(settings: Settings, key: str) -> Path:
    """Return the directory of one decision."""
    return settings.home / "windows" / key


def decision_path(settings: Settings, key: str) -> Path:
    """Return the file that is there, complete, once the decision is made; it is written last."""
    return window_directory(settings, key) / "decision.json"


def decided(settings: Settings, key: str) -> bool:
    """Whether the decision is made."""
    return decision_path(settings, key).is_file()


def read_decisions(settings: Settings) -> list[Decision]:
    """Return the decisions made so far, oldest first."""
    paths = sorted(settings.home.glob("windows/*/decision.json"), key=lambda path: path.stat().st_mtime)
    return [read_json(path, Decision) for path in paths]


def decisions_of(settings: Settings, base: "Weights", checkpoints: Mapping[int, str]) -> list[Decision]:
    """Return the decisions on windows of these checkpoints (identity by step), made under these settings.

    A run that was started anew, or resumed inside a window, has not been decided.
    """
    return [
        decision
        for decision in read_decisions(settings)
        if decision.key == key_up_to(settings, base, checkpoints, decision.window)
    ]


def attempt(settings: Settings, base: "Weights", checkpoints: Mapping[int, str]) -> tuple[int, int]:
    """Return (n, of): the window of `checkpoints` (identity by step) is the n-th of `of` sharing the gate's error."""
    if settings.window != "auto":
        return 1, 1
    last = max(checkpoints)
    earlier = [
        decision for decision in decisions_of(settings, base, checkpoints) if decision.gates and decision.window < last
    ]
    return len(earlier) + 1, settings.attempts


@contextmanager
def claim(settings: Settings, key: str) -> Iterator[bool]:
    """Hold the window while working on it; yields False when another process does."""
    path = _claim_path(settings, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Longer than the moment in which the watcher tries the lock.
    with held(path, seconds=2.0) as mine:
        yield mine


def claimed(settings: Settings, key: str) -> bool:
    """Whether a live process holds the window."""
    path = _claim_path(settings, key)
    if not path.exists():
        return False
    with held(path, seconds=0.0) as mine:
        return not mine


def _claim_path(settings: Settings, key: str) -> Path:
    return window_directory(settings, key) / "claim.lock"
