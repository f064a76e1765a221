"""What of a training run's state is of no use any more: losing candidates, and answers for decisions that are made."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flows.settings import Settings
from flows.state.decision import Decision, Model
from flows.state.windows import claimed, decision_path, read_decisions, window_directory

# Beside them lies what the evaluations of all have in common: the problems by content, a few kilobytes.
_KEPT = ("contents",)


@dataclass(frozen=True)
class Clutter:
    """A directory that may go, what it is, and the bytes that frees: what has another name elsewhere frees none."""

    what: str
    directory: str
    size: int


def clutter(settings: Settings) -> list[Clutter]:
    """Return what may go, the largest first; nothing of a window that is not decided.

    What is registered stays, and so do the newest decision's winner and every copy of a last observed checkpoint, which
    predictions are compared with when the run reaches them. A losing candidate that is gone is not compared any more.
    """
    decisions = read_decisions(settings)
    leftovers = [
        each for decision in decisions for each in _losers(settings, decision, newest=decision is decisions[-1])
    ]
    if decisions and not any(claimed(settings, path.name) for path in settings.home.glob("windows/*")):
        leftovers += _evaluations(settings, decisions[-1])
    return sorted(leftovers, key=lambda each: each.size, reverse=True)


def remove(settings: Settings) -> list[Clutter]:
    """Remove what may go, and return it."""
    gone = clutter(settings)
    for each in gone:
        shutil.rmtree(each.directory)
    return gone


def _losers(settings: Settings, decision: Decision, *, newest: bool) -> Iterator[Clutter]:
    models = dict.fromkeys(score.model for score in (*decision.selection, *decision.dropped))
    home = window_directory(settings, decision.key).resolve()
    for model in models:
        kept = model == decision.winner and (newest or decision.verdict == "registered")
        directory = Path(model.directory)
        # Another path stands in a state that was copied from elsewhere.
        if model.role == "candidate" and not kept and directory.is_dir() and directory.resolve().is_relative_to(home):
            yield Clutter(_title(model, decision), str(directory), _size(directory))


def _title(model: Model, decision: Decision) -> str:
    return f"losing candidate {model.title} of window {decision.window}"


def _evaluations(settings: Settings, newest: Decision) -> Iterator[Clutter]:
    """Yield what was answered before the newest decision was made; the next one would ask the base again."""
    made = decision_path(settings, newest.key).stat().st_mtime
    for directory in sorted((settings.home / "evaluations").glob("*/")):
        if directory.name not in _KEPT and _changed(directory) <= made:
            yield Clutter(f"evaluation {directory.name}", str(directory), _size(directory))


def _changed(directory: Path) -> float:
    return max((path.stat().st_mtime for path in directory.rglob("*")), default=directory.stat().st_mtime)


def _size(directory: Path) -> int:
    files = (path.lstat() for path in directory.rglob("*") if not path.is_dir())
    return sum(512 * file.st_blocks for file in files if file.st_nlink == 1)
