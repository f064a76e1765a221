"""What came of old predictions, each in one small file: drift/KEY/METHOD-step-N.json in the training run's state."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from flows.settings import Settings
from flows.state.lock import held
from flows.state.overtaken import Against, Paired
from flows.state.records import read_json, write_json
from relex.drift import Drift
from relex.predictors import parse_method


@dataclass(frozen=True)
class Compared:
    """A prediction for step `target`, made in window `key` after step `observed`, and what the run was at `step`.

    `promised` is the skill that the backtest said it has at least, None where it said nothing; `registered` names the
    registered version it became. `asked` is how much was compared. Without `drift`, `problem` says why there is none.
    """

    key: str
    observed: int
    method: str
    target: int
    step: int
    promised: float | None
    registered: str
    asked: Literal["weights", "accuracy"]
    drift: Drift | None
    problem: str = ""
    accuracies: tuple[Paired, ...] = ()

    @property
    def title(self) -> str:
        """What a table calls it."""
        return f"{self.method} @ {self.target}"

    @property
    def broken(self) -> bool:
        """Whether it is worse than was promised, by more than the rounding of the output explains."""
        return (
            self.promised is not None
            and self.drift is not None
            and self.drift.skill is not None
            and self.drift.skill + self.drift.rounding < self.promised
        )

    @property
    def overtaken(self) -> Against | None:
        """The first comparison in which the real checkpoint beats the registered version, at 95 %; None without one."""
        against = [Against(self.registered, self.title, self.step, pair) for pair in self.accuracies]
        return next((each for each in against if each.registered and each.beaten), None)


@contextmanager
def comparing(settings: Settings) -> Iterator[bool]:
    """Hold the comparisons of a training run while working on them; yields False when another process does."""
    path = _claim_path(settings)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Longer than the moment in which the watcher tries the lock.
    with held(path, seconds=2.0) as mine:
        yield mine


def is_comparing(settings: Settings) -> bool:
    """Whether a live process is comparing."""
    path = _claim_path(settings)
    if not path.exists():
        return False
    with held(path, seconds=0.0) as free:
        return not free


def keep(settings: Settings, row: Compared) -> None:
    """Keep a comparison, complete or absent."""
    write_json(_path(settings, row.key, row.method, row.target), asdict(row))


def read_one(settings: Settings, key: str, method: str, target: int) -> Compared | None:
    """Return the comparison of one prediction, None when there is none yet."""
    path = _path(settings, key, method, target)
    return read_json(path, Compared) if path.is_file() else None


def read_compared(settings: Settings) -> list[Compared]:
    """Return every comparison made so far, by window, step and method."""
    paths = settings.home.glob("drift/*/*.json")
    rows = [read_json(path, Compared) for path in paths]
    return sorted(rows, key=lambda row: (row.observed, row.target, row.method, row.key))


def was_shown(settings: Settings, row: Compared) -> bool:
    """Whether the comparison, as it is now, was shown on the pages."""
    path = _shown_path(settings, row)
    return path.is_file() and path.read_text(encoding="utf-8") == row.asked


def mark_shown(settings: Settings, row: Compared) -> None:
    """Say that the comparison was shown."""
    _shown_path(settings, row).write_text(row.asked, encoding="utf-8")


def _path(settings: Settings, key: str, method: str, target: int) -> Path:
    return settings.home / "drift" / key / f"{parse_method(method).directory}-step-{target}.json"


def _shown_path(settings: Settings, row: Compared) -> Path:
    return _path(settings, row.key, row.method, row.target).with_suffix(".told")


def _claim_path(settings: Settings) -> Path:
    return settings.home / "drift" / "claim.lock"
