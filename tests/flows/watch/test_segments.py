"""Random histories: a trainer that saves, deletes, crashes and resumes, watchers that come and are killed.

Every checkpoint's one tensor says which segment of the run wrote it. What is announced must be of one segment, the
newest, and must hold everything of it that a watcher had the time to see.
"""

import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from flows.settings import Settings, load_settings
from flows.state.events import WINDOW_READY
from flows.state.ledger import left_behind, read_ledger, write_ledger
from flows.state.snapshot import Snapshot
from flows.watch.announce import tick
from flows.watch.pins import Pins
from relex.store import StoredCheckpoint, open_base, scan

WINDOW = 40
_ELSE = {"training_run": "random", "checkpoints": "run", "base": "base", "targets": [200]} | {
    "selection": "a.yaml",
    "gate": "b.yaml",
    "registered_model": "random",
}


@dataclass
class Trainer:
    """Writes checkpoints in the pieces in which a reader may find them; its clock ticks 100 s a piece."""

    run: Path
    random: Random
    limit: int | None
    clock: float
    step: int = 0
    segment: int = 0
    spacing: int = 10
    # What the newest segment consists of: step → the segment that wrote it.
    lineage: dict[int, int] = field(default_factory=dict)

    def work(self) -> Iterator[None]:
        """Train on; yields wherever a watcher may look, or a crash come."""
        while True:
            self.step += self.spacing
            yield from self._save(self.step)
            yield from self._prune()

    def resume(self) -> None:
        """Start a new segment at one of the complete checkpoints that are left, or anew."""
        complete = [step for step in self.lineage if (self._directory(step) / "trainer_state.json").is_file()]
        self.step = self.random.choice([0, *complete])
        self.segment += 1
        # A run that passes an old step without writing it again leaves nothing to tell the two by.
        self.spacing = self.random.choice([self.spacing, 5])

    def _directory(self, step: int) -> Path:
        return self.run / f"checkpoint-{step}"

    def _save(self, step: int) -> Iterator[None]:
        directory = self._directory(step)
        if directory.exists() and self.random.random() < 0.5:
            for old in sorted(directory.iterdir(), key=lambda _: self.random.random()):
                old.unlink()
                yield
            directory.rmdir()
            yield
        directory.mkdir(exist_ok=True)
        self._stamp(directory)
        yield
        content = save({"weight": torch.tensor([float(self.segment), float(step)])})
        self.lineage = {earlier: by for earlier, by in self.lineage.items() if earlier < step}
        with (directory / "model.safetensors").open("wb") as file:
            for end in (60, len(content)):
                file.write(content[file.tell() : end])
                file.flush()
                self._stamp(directory / "model.safetensors")
                if end == len(content):
                    # Whole, and after a quiet while complete without the marker too.
                    self.lineage[step] = self.segment
                yield
        (directory / "trainer_state.json").write_text("{}")
        self._stamp(directory / "trainer_state.json")
        yield

    def _prune(self) -> Iterator[None]:
        directories = sorted(self.run.iterdir(), key=lambda path: path.stat().st_mtime)
        for directory in directories[: -self.limit] if self.limit else ():
            for file in sorted(directory.iterdir(), key=lambda _: self.random.random()):
                file.unlink()
                yield
            directory.rmdir()
            yield

    def _stamp(self, path: Path) -> None:
        self.clock += 100
        for place in {path, path.parent} - {self.run}:
            os.utime(place, (self.clock, self.clock))


@dataclass
class Watcher:
    """One watcher process; what it knows is on disk, but for what `pins` remembers."""

    settings: Settings
    pins: Pins

    def look(self, now: float) -> list[tuple[int, int]] | None:
        """Look once; return (step, segment) of every checkpoint of the window that is announced."""
        base = open_base(self.settings.base)
        self.pins.refresh()
        end = self.pins.end()
        kept = scan(self.settings.store, base, now=now) if Path(self.settings.store).exists() else ()
        stored = tuple(checkpoint for checkpoint in kept if checkpoint.step <= end)
        before = read_ledger(self.settings)
        events, ledger = tick(self.settings, Snapshot(base, before, stored, now), end=WINDOW)
        if ledger != before:
            write_ledger(self.settings, ledger)
        steps = [event.payload["steps"] for event in events if event.name == WINDOW_READY]
        result = [_content(checkpoint) for checkpoint in stored if checkpoint.step in steps[0]] if steps else None
        self.pins.drop(left_behind(stored, ledger.checkpoints))
        return result


def _content(entry: StoredCheckpoint) -> tuple[int, int]:
    segment, step = load_file(Path(str(entry.directory)) / "model.safetensors")["weight"].tolist()
    return int(step), int(segment)


@pytest.mark.parametrize("pin", ["link", pytest.param("copy", marks=pytest.mark.slow)])
@pytest.mark.parametrize("attentive", [True, False], ids=["watched throughout", "watched now and then"])
def test_what_is_announced_is_one_segment_the_newest_and_whole(pin: str, attentive: bool) -> None:
    announced = [history(seed, pin, attentive=attentive) for seed in range(20)]
    # Else nothing was tested.
    assert sum(announced) > 20


def history(seed: int, pin: str, *, attentive: bool) -> int:
    """Play one history; return how many windows were announced."""
    random = Random(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "run").mkdir()
        (root / "base").mkdir()
        (root / "base" / "config.json").write_text("{}")
        (root / "base" / "model.safetensors").write_bytes(save({"weight": torch.zeros(2)}))
        (root / "relex.yaml").write_text(yaml.safe_dump(_ELSE | {"window": WINDOW, "pin": pin}))
        settings = load_settings(root / "relex.yaml")
        trainer = Trainer(root / "run", random, random.choice([None, 1, 2, 3]), time.time() - 1e6)
        watcher, seen, count = Watcher(settings, Pins(settings)), dict[int, int](), 0
        work = trainer.work()
        for _ in range(120):
            next(work)
            if random.random() < 0.03:
                trainer.resume()
                work = trainer.work()
            if random.random() < 0.05:
                watcher = Watcher(settings, Pins(settings))
            if not attentive and random.random() < 0.5:
                continue
            for _ in range(2 if pin == "copy" else 1):
                watcher.pins.refresh()
            seen |= {step: by for step, by in trainer.lineage.items() if _there(trainer, step)}
            if random.random() < 0.5:
                look_result = watcher.look(trainer.clock)
                if look_result is not None:
                    count += 1
                    check(look_result, trainer.lineage, seen, where=f"seed {seed}, {pin}")
        return count


def check(result: list[tuple[int, int]], lineage: dict[int, int], seen: dict[int, int], *, where: str) -> None:
    newest = {step: by for step, by in lineage.items() if step <= WINDOW}
    assert dict(result).items() <= newest.items(), where
    owed = {step: by for step, by in newest.items() if seen.get(step) == by}
    assert owed.items() <= dict(result).items(), where


def _there(trainer: Trainer, step: int) -> bool:
    directory = trainer.run / f"checkpoint-{step}"
    return all((directory / name).is_file() for name in ("model.safetensors", "trainer_state.json"))
