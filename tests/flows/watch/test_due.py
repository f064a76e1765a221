"""When an automatic window is due, on stores of real files: straight runs, random walks, refusals, restarts."""

import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from evaluation.verdict.gate import Gate
from flows.settings import Settings, load_settings
from flows.state.decision import Decision
from flows.state.ledger import Ledger, known, left_behind, segment
from flows.state.records import write_json
from flows.state.windows import attempt, decision_path, key_of
from flows.watch.due import DueWindow, arm
from relex.layouts.weights import Weights
from relex.store import open_base, scan

SPACING = 4
SIZE = (30, 40)


@dataclass
class Store:
    """A run that goes along a line with noise, or nowhere, saved every 4 steps."""

    settings: Settings
    kind: str
    step: int = 0

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._base, self._way = (torch.randn(SIZE, generator=self._generator) for _ in range(2))
        self._walk = torch.zeros(SIZE)
        self._write(Path(self.settings.base), self._base)

    def train(self, *, until: int) -> None:
        while self.step < until:
            self.step += SPACING
            noise = torch.randn(SIZE, generator=self._generator)
            self._walk += noise
            delta = 0.05 * self.step * self._way + 0.1 * noise if self.kind == "line" else self._walk
            path = Path(self.settings.checkpoints) / f"checkpoint-{self.step}"
            self._write(path, self._base + 0.1 * delta)
            (path / "trainer_state.json").write_text("{}")

    def _write(self, path: Path, weight: torch.Tensor) -> None:
        path.mkdir(parents=True)
        save_file({"weight": weight}, path / "model.safetensors")
        (path / "config.json").write_text("{}")

    def arm(self) -> DueWindow:
        base, identities = self.seen()
        now = time.time()
        stored = scan(self.settings.checkpoints, base, now=now)
        checkpoints = known(stored, Ledger(), now=now)
        behind = left_behind(stored, checkpoints)
        ours = {step: seen for step, seen in checkpoints.items() if int(step) not in behind}
        assert identities.keys() == {int(step) for step in checkpoints}
        return arm(self.settings, base, segment(stored, checkpoints), ours)

    def seen(self) -> tuple[Weights, dict[int, str]]:
        base = open_base(self.settings.base)
        stored = scan(self.settings.checkpoints, base, now=time.time())
        return base, {
            checkpoint.step: checkpoint.weights.identity for checkpoint in stored if checkpoint.weights is not None
        }

    def decided(self, window: int, *, gated: bool = True, registered: bool = False) -> None:
        """Write the decision on the window that ends at a step."""
        base, identities = self.seen()
        inside = {step: identity for step, identity in identities.items() if step <= window}
        key = key_of(self.settings, base, inside)
        gate = Gate("a", "b", "gate", 100, 0.5, 0.5, 0.0, -0.1, 0.95, 0.0, "paired t", "not shown")
        decision = Decision(
            self.settings.training_run,
            key,
            window,
            tuple(inside),
            "registered" if registered else "keep training",
            "because",
            gates=(gate,) if gated else (),
        )
        write_json(decision_path(self.settings, key), decision.to_json())


@pytest.fixture
def automatic(tmp_path: Path) -> Settings:
    path = tmp_path / "relex.yaml"
    content = {
        "training_run": "tiny",
        "checkpoints": "run",
        "base": "base",
        "window": "auto",
        "max_window": 96,
        "targets": "auto",
        "selection": "selection.yaml",
        "gate": "gate.yaml",
        "registered_model": "tiny",
        "threads": 1,
        "attempts": 2,
    }
    path.write_text(yaml.safe_dump(content))
    return load_settings(path)


def test_a_line_is_due_as_soon_as_three_looks_agree_and_stays_due_until_it_is_decided(automatic: Settings) -> None:
    store = Store(automatic, "line")
    ends = {}
    for step in range(8, 60, SPACING):
        store.train(until=step)
        ends[step] = store.arm().end
        if ends[step] is not None:
            break
    assert all(end is None for step, end in ends.items() if step < 36)
    due = store.arm().end
    assert due == store.step
    # The run goes on while the window is being decided.
    store.train(until=store.step + 12)
    assert store.arm().end == due
    assert not store.arm().closed


def test_a_random_walk_is_due_at_max_window_only(automatic: Settings) -> None:
    store = Store(automatic, "walk")
    for step in (32, 48, 64, 92):
        store.train(until=step)
        armed = store.arm()
        assert armed.end is None
        assert "backtest at step" in armed.text
    store.train(until=96)
    assert store.arm().end == 96
    store.train(until=120)
    assert store.arm().end == 96
    store.decided(96, gated=False)
    assert store.arm() == DueWindow(96, "refused at step 96, the last one that is observed", closed=True)


def test_the_run_is_looked_at_again_only_when_it_has_grown_by_a_tenth(automatic: Settings) -> None:
    store = Store(automatic, "walk")
    store.train(until=60)
    store.arm()
    looked = (automatic.home / "look.json").stat().st_mtime_ns
    store.train(until=64)
    assert "step 60" in store.arm().text
    assert (automatic.home / "look.json").stat().st_mtime_ns == looked
    store.train(until=68)
    assert "step 68" in store.arm().text


def test_a_refused_window_arms_again_after_half_as_many_steps_until_the_attempts_are_spent(automatic: Settings) -> None:
    store = Store(automatic, "line")
    store.train(until=40)
    assert store.arm().end == 40
    store.decided(40)
    # Decided once more it is the same attempt.
    assert attempt(automatic, *store.seen()) == (1, 2)
    assert store.arm().end is None
    store.train(until=56)
    assert store.arm() == DueWindow(None, "refused at step 40; looked at again from step 60")
    base, identities = store.seen()
    assert attempt(automatic, base, identities) == (2, 2)
    store.train(until=60)
    assert store.arm().end == 60
    store.decided(60)
    assert store.arm() == DueWindow(60, "2 of 2 attempts at the gate are spent", closed=True)


def test_a_refusal_before_the_gate_spends_no_attempt(automatic: Settings) -> None:
    store = Store(automatic, "line")
    store.train(until=40)
    store.decided(40, gated=False)
    store.train(until=60)
    base, identities = store.seen()
    assert attempt(automatic, base, identities) == (1, 2)


def test_after_a_registration_nothing_more_is_due_but_of_another_run_in_its_place(automatic: Settings) -> None:
    store = Store(automatic, "line")
    store.train(until=40)
    store.decided(40, registered=True)
    store.train(until=96)
    assert store.arm() == DueWindow(40, "registered from step 40", closed=True)
    shutil.rmtree(automatic.checkpoints)
    shutil.rmtree(automatic.base)
    again = Store(automatic, "line")
    again.train(until=44)
    assert again.arm().end == 44


def test_the_window_does_not_wait_for_the_planned_end(automatic: Settings) -> None:
    store = Store(automatic.model_copy(update={"total_steps": 5000}), "line")
    store.train(until=40)
    assert store.arm().end == 40


def test_what_cannot_be_read_is_told_and_decided_at_the_end(automatic: Settings) -> None:
    store = Store(automatic, "line")
    store.train(until=40)
    run = Path(automatic.checkpoints)
    shutil.copy(run / "checkpoint-36/model.safetensors", run / "checkpoint-40/model.safetensors")
    (run / "checkpoint-40/trainer_state.json").write_text("{}")
    armed = store.arm()
    assert armed.end is None
    assert "36" in armed.text
    assert "40" in armed.text
    store.train(until=96)
    assert store.arm().end == 96


def test_a_checkpoint_that_is_not_ready_holds_the_end_back(automatic: Settings) -> None:
    store = Store(automatic, "walk")
    store.train(until=80)
    (Path(automatic.checkpoints) / "checkpoint-80/trainer_state.json").unlink()
    store.train(until=100)
    armed = store.arm()
    assert armed.end is None
    assert "backtest at step 76" in armed.text


def test_a_given_window_is_armed_as_it_is(automatic: Settings) -> None:
    fixed = automatic.model_copy(update={"window": 40, "max_window": None, "targets": [100]})
    store = Store(fixed, "walk")
    store.train(until=44)
    assert store.arm() == DueWindow(40)
    store.decided(40)
    assert store.arm() == replace(DueWindow(40), closed=True)
    assert attempt(fixed, *store.seen()) == (1, 1)
