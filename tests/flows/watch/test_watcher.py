"""The watcher outlives what happens to the directory it looks at."""

import errno
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.settings import Settings
from flows.state.ledger import read_ledger
from flows.watch import watcher
from flows.watch.standing import read_standing
from flows.watch.watcher import watch_store
from relex.store import State, open_base, scan
from tests.helpers.straight_run import WriteCheckpoint, make_old


@pytest.fixture(autouse=True)
def no_server() -> Iterator[None]:
    """Events go nowhere, instead of to a server that would be started for them."""
    EventsWorker.set_client_override(NullEventsClient)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        yield
    EventsWorker.set_client_override(None)


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


def failing(
    monkeypatch: pytest.MonkeyPatch, function: str, place: str, *, number: int, times: float = float("inf")
) -> None:
    """Let a function of the operating system fail so many times for a path below `place`."""
    left = [times]
    real: Callable[..., Any] = getattr(os, function)

    def fail(path: Any, *args: Any, **kwargs: Any) -> Any:
        if f"/{place}" in f"{path}/" and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, function, fail)


def write_header(step: Path, header: bytes) -> None:
    (step / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


GOOD = (10, 20, 30, 40)


@pytest.mark.parametrize("pin", ["none", "link", pytest.param("copy", marks=pytest.mark.slow)])
def test_one_bad_directory_of_each_kind_is_told_once_and_the_good_ones_are_announced(
    settings: Settings,
    write_checkpoint: WriteCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    pin: Literal["none", "link", "copy"],
) -> None:
    own = settings.model_copy(update={"pin": pin, "poll_seconds": 0.05})
    run = Path(own.checkpoints)
    for step in (0, *GOOD):
        write_checkpoint(step)
    bad = {step: write_checkpoint(step) for step in (12, 13, 15, 16, 17, 18, 19, 22, 23)}
    (run / "checkpoint-11").symlink_to("checkpoint-11")
    write_header(bad[12], b"[]")
    (run / "step_13").mkdir()
    write_header(bad[15], b'{"weight": {"dtype": "F32", "shape": [' + b"1" * 5000 + b'], "data_offsets": [0, 4]}}')
    write_header(bad[16], b"[" * 100_000 + b"]" * 100_000)
    (bad[17] / "vocab.txt").symlink_to("/proc/self/environ")
    (bad[18] / "config.json").unlink()
    (bad[18] / "config.json").symlink_to("/etc/passwd")
    with (bad[19] / "config.json").open("ab") as file:
        file.truncate(8 << 30)
    # A loop that a walk would double at each level.
    (bad[22] / "model.safetensors").unlink()
    for name in ("a", "b"):
        (bad[22] / name).symlink_to(".")
    for path in bad.values():
        os.utime(path, (0, 0))
        for file_or_link in path.iterdir():
            os.utime(file_or_link, (0, 0), follow_symlinks=False)
    elsewhere = run.parent / "elsewhere"
    write_checkpoint(24).rename(elsewhere)
    make_old(elsewhere)
    (run / "checkpoint-24").symlink_to(elsewhere)
    os.utime(run / "checkpoint-24", (0, 0), follow_symlinks=False)
    failing(monkeypatch, "scandir", "checkpoint-14/", number=errno.EACCES)
    (run / "checkpoint-14").mkdir()
    failing(monkeypatch, "open", "checkpoint-23/model.safetensors/", number=errno.EIO)
    said: list[str] = []
    with caplog.at_level(logging.WARNING):
        end = time.monotonic() + 120
        while len(read_ledger(own).checkpoints) < len(GOOD) or len(said) < 3:
            assert time.monotonic() < end, said
            watch_store(own, seconds=3.0, on_look=lambda _, text: said.append(text))
    assert sorted(map(int, read_ledger(own).checkpoints)) == list(GOOD)
    assert read_ledger(own).windows == {}
    lines = Counter(record.getMessage() for record in caplog.records if record.name == "flows.watch.watcher")
    assert all("\n" not in line for line in lines)
    # A copy is made when a file has not changed from one look to the next.
    patience = 2 if pin == "copy" else 1
    for step in (11, 12, 13, 14, 15, 16, 17, 18, 19, 22, 24):
        told = [line for line in lines if f"step {step} is broken" in line]
        assert 0 < len(told) <= patience, (step, lines)


def test_a_bad_directory_is_told_once(
    settings: Settings, write_checkpoint: WriteCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (0, 10, 20):
        write_checkpoint(step)
    write_header(live(settings, 20), b"[]")
    make_old(live(settings, 20))
    looks = []
    with caplog.at_level(logging.WARNING):
        watch_store(
            settings.model_copy(update={"poll_seconds": 0.01}),
            seconds=2.0,
            on_look=lambda _, text: looks.append(text),
        )
    assert len(looks) > 2
    (line,) = [record.getMessage() for record in caplog.records if record.name == "flows.watch.watcher"]
    assert line.startswith("step 20 is broken: ")
    assert "its header holds a JSON list, not an object" in line


@pytest.mark.parametrize(
    ("pin", "fault"),
    [("link", ("link", errno.EIO)), ("link", ("scandir", errno.ESTALE)), ("copy", ("scandir", errno.EIO))],
)
def test_an_error_of_the_moment_costs_no_pinned_step(
    settings: Settings,
    write_checkpoint: WriteCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    pin: Literal["link", "copy"],
    fault: tuple[str, int],
) -> None:
    own = settings.model_copy(update={"pin": pin, "poll_seconds": 0.2})
    for step in (0, 10, 20):
        write_checkpoint(step)
    failing(monkeypatch, fault[0], "run/checkpoint-20/", number=fault[1], times=12)
    end = time.monotonic() + 60
    base = open_base(own.base)
    while sorted(map(int, read_ledger(own).checkpoints)) != [10, 20]:
        assert time.monotonic() < end
        watch_store(own, seconds=1.0)
    pinned = scan(own.pins, base, now=time.time())
    assert [(checkpoint.step, checkpoint.state) for checkpoint in pinned] == [(10, State.READY), (20, State.READY)]


def test_a_tracker_of_thousands_of_digits_is_waited_for(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    write_checkpoint(0)
    step = write_checkpoint(10)
    (step / "trainer_state.json").unlink()
    step.rename(step.with_name("global_step_10"))
    (step.parent / "latest_checkpointed_iteration.txt").write_text("1" * 5000)
    watch_store(settings, seconds=0.1)
    (checkpoint,) = scan(settings.checkpoints, open_base(settings.base), now=time.time())
    assert checkpoint.state is State.NOT_YET
    assert "latest_checkpointed_iteration.txt reads '111" in checkpoint.reason


def test_a_base_that_is_half_written_is_waited_for(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    base = write_checkpoint(0)
    write_checkpoint(10)
    whole = (base / "config.json").read_text()
    (base / "config.json").write_text(whole[:-1])
    said: list[str] = []
    watch_store(settings, seconds=0.1, on_look=lambda _, text: said.append(text))
    assert "waiting: " in said[-1]
    assert "config.json is not JSON" in said[-1]
    (base / "config.json").write_text(whole)
    watch_store(settings, seconds=0.1)
    assert list(read_ledger(settings).checkpoints) == ["10"]


def live(settings: Settings, step: int) -> Path:
    return Path(settings.checkpoints) / f"checkpoint-{step}"


def watched(settings: Settings, *, seconds: float = 0.3) -> list[str]:
    """Watch a while and return what was seen, each text once."""
    said: list[str] = []
    watch_store(
        settings.model_copy(update={"poll_seconds": 0.05}), seconds=seconds, on_look=lambda _, x: said.append(x)
    )
    return list(dict.fromkeys(said))


def test_a_base_and_a_store_that_are_not_there_are_said_once_in_the_log_and_in_the_state(
    settings: Settings, write_checkpoint: WriteCheckpoint, caplog: pytest.LogCaptureFixture
) -> None:
    base, run = (f"waiting for {place}: not there" for place in (settings.base, settings.checkpoints))
    with caplog.at_level(logging.WARNING, logger="flows.watch"):
        assert watched(settings) == [f"tiny: {base}; {run}"]
        assert [record.getMessage() for record in caplog.records] == [base, run]
    standing = read_standing(settings)
    assert standing is not None
    assert (standing.text, standing.progress) == (f"tiny: {base}; {run}", 0.0)
    write_checkpoint(0)
    assert watched(settings)[-1] == f"tiny: {run}"
    write_checkpoint(10)
    assert "waiting" not in watched(settings)[-1]


def test_a_full_disk_is_waited_for_with_one_line_and_what_came_meanwhile_is_announced(
    settings: Settings,
    write_checkpoint: WriteCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (0, 10):
        write_checkpoint(step)
    watch_store(settings, seconds=0.1)
    write_checkpoint(20)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="flows.watch"):
        patch.setattr(os, "fsync", full)
        line = f"waiting for room in {settings.state}: No space left on device"
        assert watched(settings)[-1] == f"tiny: {line}"
        assert [record.getMessage() for record in caplog.records] == [line]
    standing = read_standing(settings)
    assert standing is not None
    assert standing.text == f"tiny: {line}"
    watch_store(settings, seconds=0.1)
    assert sorted(map(int, read_ledger(settings).checkpoints)) == [10, 20]


def test_a_disk_without_room_for_the_state_directory_is_waited_for(
    settings: Settings, write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (0, 10):
        write_checkpoint(step)
    monkeypatch.setattr(watcher, "_AGAIN_SECONDS", 0.01)
    failing(monkeypatch, "mkdir", ".relex/", number=errno.ENOSPC, times=2)
    said = watched(settings)
    assert said[0] == f"tiny: waiting for room in {settings.state}: No space left on device"
    assert list(read_ledger(settings).checkpoints) == ["10"]


@pytest.mark.parametrize("function", ["link", "mkdir"])
def test_a_disk_without_room_for_pins_is_waited_for_with_one_line_and_breaks_no_step(
    settings: Settings,
    write_checkpoint: WriteCheckpoint,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
) -> None:
    own = settings.model_copy(update={"pin": "link"})
    for step in (0, 10, 20):
        make_old(write_checkpoint(step))
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="flows.watch"):
        failing(patch, function, "run/" if function == "link" else "pins/", number=errno.ENOSPC)
        line = f"waiting for room in {settings.state}: No space left on device"
        assert watched(own) == [f"tiny: {line}"]
        assert [record.getMessage() for record in caplog.records] == [line]
    watch_store(own, seconds=0.1)
    assert sorted(map(int, read_ledger(own).checkpoints)) == [10, 20]
