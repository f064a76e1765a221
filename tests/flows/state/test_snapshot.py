import os
from pathlib import Path

from flows.settings import Settings
from flows.state.ledger import Ledger, Seen, write_ledger
from flows.state.snapshot import look_at
from tests.helpers.straight_run import WriteCheckpoint


def test_a_look_shows_the_newest_segment_and_remembers_the_released_window(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 20, 40):
        write_checkpoint(step)
    # Step 20 was written last: a run that resumed at 10 left 40 behind.
    for step, seconds in ((10, 1000), (40, 2000), (20, 3000)):
        for path in Path(settings.checkpoints, f"checkpoint-{step}").iterdir():
            os.utime(path, (seconds, seconds))
    deleted = Seen("of a checkpoint that was pruned", 500 * 10**9)
    write_ledger(settings, Ledger(checkpoints={"5": deleted}, released={"3": deleted}))
    run = look_at(settings, settings.checkpoints)
    assert [checkpoint.step for checkpoint in run.stored] == [10, 20, 40]
    assert run.left_behind == {40}
    assert [checkpoint.step for checkpoint in run.newest] == [10, 20]
    assert {step: seen.written for step, seen in run.known.items()} == {
        "5": 500 * 10**9,
        "10": 1000 * 10**9,
        "20": 3000 * 10**9,
        "40": 2000 * 10**9,
    }
    assert run.ever == {"3": deleted, **run.known}
