"""What a training run holds at one moment, as the store shows it and the ledger knows it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from flows.settings import Settings
from flows.state.ledger import Ledger, Seen, known, left_behind, read_ledger
from relex.files.block_cache import BlockCache
from relex.files.directory import Directory
from relex.layouts.weights import Weights
from relex.store import StoredCheckpoint, open_base, scan


@dataclass(frozen=True)
class Snapshot:
    """The base, the ledger and the checkpoints of a run at time `now` (seconds since the epoch)."""

    base: Weights
    ledger: Ledger
    stored: tuple[StoredCheckpoint, ...]
    now: float

    @cached_property
    def known(self) -> Mapping[str, Seen]:
        """The checkpoints of the ledger and, over them, those that are ready now, by step."""
        return known(self.stored, self.ledger, now=self.now)

    @cached_property
    def left_behind(self) -> frozenset[int]:
        """The steps of earlier segments: a run that resumed before them left them behind."""
        return frozenset(left_behind(self.stored, self.known))

    @property
    def ever(self) -> dict[str, Seen]:
        """What is known, and the released window, whose checkpoints the trainer may have deleted since."""
        return {**self.ledger.released, **self.known}

    @property
    def newest(self) -> tuple[StoredCheckpoint, ...]:
        """The checkpoints of the newest segment of the run."""
        return tuple(checkpoint for checkpoint in self.stored if checkpoint.step not in self.left_behind)


def look_at(settings: Settings, store: str | Directory, *, blocks: BlockCache | None = None) -> Snapshot:
    """Return what is in `store` now: the run's own (`settings.checkpoints`), or the window's, which may be pinned.

    Raises RelexError where the base or the store cannot be read.
    """
    base, ledger, now = open_base(settings.base, blocks=blocks), read_ledger(settings), time.time()
    return Snapshot(base, ledger, scan(store, base, now=now, blocks=blocks), now)


def absences(settings: Settings, base: Directory, run: Directory) -> list[str]:
    """Return a line for each of base and checkpoints that is not there: where it should be, and what is missing."""
    lines = []
    if not base.exists():
        lines.append(f"{settings.base}: not there")
    elif "config.json" not in base.files():
        lines.append(f"{settings.base}: it has no config.json")
    return lines if run.exists() else [*lines, f"{settings.checkpoints}: not there"]
