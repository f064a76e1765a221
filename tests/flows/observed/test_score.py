"""Observed checkpoints that are scored as they appear: which, in what order, the best of them, and what is kept."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows.drift.announce import announce
from flows.drift.page import observed
from flows.observed import score
from flows.observed.score import catch_up, due
from flows.settings import Settings, load_settings
from flows.state.decision import Model, Score
from flows.state.ledger import Ledger, Seen
from flows.state.records import write_json
from flows.state.scored import Scored, best, best_for, keep_scored, read_scored, scored_directory
from flows.state.snapshot import look_at
from flows.state.windows import decision_path, key_of, read_decisions
from relex.output import manifest
from tests.helpers.decided_run import KEY, write_decided
from tests.helpers.stopped import configure
from tests.helpers.straight_run import WriteCheckpoint, make_old


@pytest.fixture
def settings(config: Path, write_checkpoint: WriteCheckpoint) -> Settings:
    for step in (0, 10, 20, 25, 40, 75):
        make_old(write_checkpoint(step))
    return configure(config, score_every=20)


def row(settings: Settings, step: int, accuracy: float, *, written: int = 1) -> Scored:
    """Keep a score whose weights are a file."""
    directory = scored_directory(settings) / f"step-{step}"
    directory.mkdir(parents=True)
    (directory / "model.safetensors").write_text(f"weights {step}")
    made = Score(Model("observed", step, str(directory)), "selection", accuracy, 0.0, 500)
    scored = Scored(step, Seen(f"files {step}", written), made)
    keep_scored(settings, scored)
    return scored


def steps_due(settings: Settings) -> list[int]:
    run = look_at(settings, settings.checkpoints)
    return [checkpoint.step for checkpoint in due(settings, run.newest, run.known)]


def test_the_first_of_every_stretch_is_scored_the_newest_first_within_the_budget(
    settings: Settings, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert steps_due(settings) == [75, 40, 20]
    assert steps_due(configure(config, score_every=None)) == []
    known = look_at(settings, settings.checkpoints).known
    keep_scored(settings, Scored(75, known["75"], None, "it is not finite"))
    keep_scored(settings, Scored(40, Seen("another file", 1), None))
    assert steps_due(settings) == [40, 20]
    # What was scored counts: earlier ones are not taken up in its place.
    monkeypatch.setattr(score, "BUDGET", 2)
    assert steps_due(settings) == [40]


def test_the_newest_that_is_due_is_announced_with_growing_pauses(settings: Settings) -> None:
    run = look_at(settings, settings.checkpoints)
    ledger = Ledger(dict(run.known))
    (event,), sent = announce(settings, run.stored, ledger, now=0.0)
    assert (event.payload["step"], event.payload["attempt"]) == (75, 1)
    assert [each.times for each in sent.values()] == [1]


def test_the_best_is_of_the_newest_segment_and_of_equals_the_earliest(settings: Settings) -> None:
    rows = [row(settings, step, accuracy, written=step) for step, accuracy in ((20, 0.5), (40, 0.7), (75, 0.7))]
    seen = {str(step): Seen("", step) for step in (10, 20, 25)}

    def step_of_best(seen: dict[str, Seen]) -> int | None:
        chosen = best(rows, seen)
        return None if chosen is None else chosen.model.step

    # Steps 40 and 75 were removed by the trainer since.
    assert step_of_best(seen) == 40
    assert step_of_best({**seen, "30": Seen("", 100)}) == 20
    assert step_of_best({"5": Seen("", 100)}) is None


def test_a_decision_is_compared_with_the_same_best_however_often_it_is_started(settings: Settings) -> None:
    assert best_for(settings, "key", {}) is None
    first = row(settings, 20, 0.5)
    chosen = best_for(settings, "key", {})
    assert chosen is not None
    assert chosen.title == "best observed @ 20"
    assert first.score is not None
    held = Path(chosen.directory) / "model.safetensors"
    assert held.samefile(Path(first.score.model.directory) / "model.safetensors")
    row(settings, 40, 0.9)
    score._tidy(settings, {})
    assert not Path(first.score.model.directory).exists()
    assert best_for(settings, "key", {}) == chosen
    assert held.read_text() == "weights 20"
    later = best_for(settings, "later", {})
    assert later is not None
    assert later.step == 40


def test_windows_keep_their_names_where_nothing_is_scored() -> None:
    plain = Settings(
        training_run="tiny",
        checkpoints="run",
        base="base",
        window=40,
        targets=[100],
        selection="selection",
        gate="gate",
        registered_model="tiny",
    )
    base: Any = SimpleNamespace(identity="base")
    checkpoints = {10: "a", 20: "b"}
    # As versions before this key had them.
    assert key_of(plain, base, checkpoints) == "ce31c5db5891ff16"
    every = {key_of(plain.model_copy(update={"score_every": step}), base, checkpoints) for step in (20, 50)}
    assert len(every - {"ce31c5db5891ff16"}) == 1


def test_it_is_said_where_the_scores_lie_and_which_is_the_best(settings: Settings) -> None:
    rows = [row(settings, 20, 0.5), row(settings, 40, 0.7), Scored(75, Seen("", 3), None, "it holds NaN")]
    assert observed(settings, rows) == [
        "Observed checkpoints on 500 problems of selection: step 20 0.5000, step 40 0.7000 (the best). Kept in"
        f" {scored_directory(settings)}.",
        "step 75 cannot be scored: it holds NaN",
    ]
    assert observed(settings, []) == []


@pytest.mark.slow
def test_real_checkpoints_are_scored_and_the_weights_of_the_best_are_kept(tmp_path: Path) -> None:
    settings = write_decided(tmp_path, score_every=10, report=[])
    (decision,) = read_decisions(settings)
    write_json(decision_path(settings, KEY), replace(decision, registered="tiny-candidates version 1").to_json())
    told: list[str] = []
    rows = catch_up(settings, tell=lambda what, done, total: told.append(what) if done == total else None)
    assert told == ["selection @ 100", "selection @ 25", "selection @ 10"]
    assert [(each.step, each.score.n) for each in rows if each.score is not None] == [(10, 12), (25, 12), (100, 12)]
    # The registered version is paired with what the run reaches after its window.
    assert [each.against.title if each.against else "" for each in rows] == ["", "", "relex @ 100"]
    assert rows[-1].against is not None
    assert (rows[-1].against.pair.benchmark, rows[-1].against.pair.n) == ("selection", 12)
    # Random models know nothing: of equals it is the earliest.
    kept = scored_directory(settings) / "step-10"
    assert list(scored_directory(settings).glob("step-*/")) == [kept]
    assert manifest.verify(kept).forecast.method == "observed"
    again = catch_up(settings, tell=lambda *_: pytest.fail("nothing is due"))
    assert again == rows == read_scored(load_settings(tmp_path / "relex.yaml"))
    # What the trainer removes is still the best.
    run = look_at(settings, settings.checkpoints)
    chosen = best_for(settings, "key", run.ever)
    assert chosen is not None
    assert replace(chosen, directory="") == Model("best", 10, "", digest=manifest.read(kept).digest)
