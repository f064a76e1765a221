"""The watcher outlives what happens to the directory it looks at."""

import threading
import time
from pathlib import Path

from flows.settings import Settings
from flows.state.ledger import read_ledger
from flows.watch.watcher import watch_store
from tests.helpers.straight_run import WriteCheckpoint


def test_a_run_that_is_moved_away_while_it_is_looked_at_is_waited_for(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 20, 25, 40):
        write_checkpoint(step)
    place = Path(settings.checkpoints)
    ended = threading.Event()

    def move() -> None:
        # As somebody who starts the run anew, very often.
        while not ended.is_set():
            away = place.rename(place.with_name("former"))
            time.sleep(0.001)
            away.rename(place)
            time.sleep(0.001)

    mover = threading.Thread(target=move)
    mover.start()
    told: list[str] = []
    try:
        end = time.monotonic() + 240
        # Until it went in the middle of a look, and not between two.
        while not any("waiting: " in text for text in told):
            assert time.monotonic() < end
            watch_store(
                settings.model_copy(update={"poll_seconds": 0.001}),
                seconds=1.0,
                on_look=lambda _, text: told.append(text),
            )
    finally:
        ended.set()
        mover.join()
    watch_store(settings, seconds=0.1)
    assert sorted(map(int, read_ledger(settings).checkpoints)) == [10, 20, 25, 40]
