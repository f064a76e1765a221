"""Observed checkpoints that were scored on the selection problems, each in one small file, and the best of them.

The best is chosen on selection problems and judged on gate problems: of many that were tried on the same problems, one
is the best by luck.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.settings import Settings
from flows.state.decision import Model, Score
from flows.state.ledger import Seen
from flows.state.overtaken import Against
from flows.state.records import read_json, write_json
from flows.state.windows import window_directory


@dataclass(frozen=True)
class Scored:
    """The checkpoint of training step `step`, and its score, None where `problem` says why.

    `against` compares it with the version that was registered last, before its step, on the same problems.
    `seen` is what its files were, and when they were written. The weights of the best lie in `score.model.directory`;
    those of the others are gone.
    """

    step: int
    seen: Seen
    score: Score | None
    problem: str = ""
    against: Against | None = None

    @property
    def overtaken(self) -> Against | None:
        """The comparison with the registered version, if the checkpoint beats it."""
        return self.against if self.against is not None and self.against.beaten else None


def scored_directory(settings: Settings) -> Path:
    """Return where the scores lie, and the weights of the best."""
    return settings.home / "observed" / "scored"


def keep_scored(settings: Settings, row: Scored) -> None:
    """Keep a score, complete or absent."""
    write_json(scored_directory(settings) / f"step-{row.step}.json", asdict(row))


def read_scored(settings: Settings) -> list[Scored]:
    """Return what was scored so far, by step."""
    rows = [read_json(path, Scored) for path in scored_directory(settings).glob("step-*.json")]
    return sorted(rows, key=lambda row: row.step)


def current(rows: Sequence[Scored], seen: Mapping[str, Seen]) -> list[Scored]:
    """Return what is of the run's newest segment: no checkpoint up to its step was written after it.

    `seen` are the checkpoints that are known; one that was scored may have been removed since.
    """
    return [
        row
        for row in rows
        if not any(int(step) <= row.step and each.written > row.seen.written for step, each in seen.items())
    ]


def best(rows: Sequence[Scored], seen: Mapping[str, Seen]) -> Score | None:
    """Return the best score of the newest segment, of equals the earliest; None where there is none."""
    scores = [row.score for row in current(rows, seen) if row.score is not None]
    return max(scores, key=lambda score: (score.accuracy, -score.model.step), default=None)


def best_for(settings: Settings, key: str, seen: Mapping[str, Seen]) -> Model | None:
    """Return the best observed checkpoint for the decision on window `key`: the same whenever that is asked.

    Its files are linked beside the window's models, since a better one may take its place meanwhile.
    """
    directory = window_directory(settings, key)
    chosen = directory / "best.json"
    if not chosen.is_file():
        score = best(read_scored(settings), seen)
        if score is None or not Path(score.model.directory).is_dir():
            return None
        place = directory / "models" / "best" / f"step-{score.model.step}"
        shutil.rmtree(place, ignore_errors=True)
        try:
            shutil.copytree(score.model.directory, place, copy_function=os.link)
        except shutil.Error:
            # A better one took its place just now.
            shutil.rmtree(place, ignore_errors=True)
            return best_for(settings, key, seen)
        write_json(chosen, asdict(Model("best", score.model.step, str(place), digest=score.model.digest)))
    return read_json(chosen, Model)
