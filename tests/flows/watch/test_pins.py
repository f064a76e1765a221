"""Pinning what a trainer deletes."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest
import torch
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings
from safetensors.torch import load_file

from flows.decide.predict import predict
from flows.errors import ConfigError, PinError
from flows.settings import Settings, load_settings
from flows.state.decision import Decision
from flows.state.ledger import read_ledger
from flows.state.records import write_json
from flows.state.windows import decision_path
from flows.watch.pins import Pins
from flows.watch.watcher import _look, watch_store
from relex.store import State, open_base, scan
from tests.helpers.straight_run import WriteCheckpoint, make_old

Pin = Literal["link", "copy"]


@pytest.fixture(autouse=True)
def no_server() -> Iterator[None]:
    """Events go nowhere, instead of to a server that would be started for them."""
    EventsWorker.set_client_override(NullEventsClient)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        yield
    EventsWorker.set_client_override(None)


PINS: tuple[Pin, ...] = ("link", "copy")


@pytest.fixture(params=PINS)
def pinned(request: pytest.FixtureRequest, settings: Settings) -> Settings:
    return settings.model_copy(update={"pin": request.param})


def live(settings: Settings, step: int) -> Path:
    return Path(settings.checkpoints) / f"checkpoint-{step}"


def twice(pins: Pins) -> None:
    """Refresh until everything is pinned: a file is copied when it was the same in two looks."""
    for _ in range(20):
        pins.refresh()


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def refuse(settings: Settings, key: str) -> None:
    """Write the decision that keeps training after step 40."""
    decision = Decision(settings.training_run, key, 40, (10, 25, 40), "keep training", "because")
    write_json(decision_path(settings, key), decision.to_json())


def test_what_the_trainer_deletes_is_kept_byte_for_byte(pinned: Settings, write_checkpoint: WriteCheckpoint) -> None:
    pins = Pins(pinned)
    expected: dict[str, bytes] = {}
    for step in (0, 10, 25, 40, 75):
        write_checkpoint(step)
        if step:
            expected |= {f"checkpoint-{step}/{name}": data for name, data in tree(live(pinned, step)).items()}
            twice(pins)
            shutil.rmtree(live(pinned, step))
    # Up to and including the first step at or after the window's end, 40.
    kept = {name: data for name, data in expected.items() if not name.startswith("checkpoint-75")}
    assert tree(pinned.pins) == kept
    stored = scan(pinned.pins, open_base(pinned.base), now=time.time())
    assert [(checkpoint.step, checkpoint.state) for checkpoint in stored] == [
        (step, State.READY) for step in (10, 25, 40)
    ]


def test_links_take_no_room_and_copies_keep_times(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    write_checkpoint(10)
    make_old(live(settings, 10))
    for pin in PINS:
        own = settings.model_copy(update={"pin": pin, "state": settings.state / pin})
        twice(Pins(own))
        ours = (own.pins / "checkpoint-10" / "model.safetensors").stat()
        theirs = (live(settings, 10) / "model.safetensors").stat()
        assert (ours.st_ino == theirs.st_ino) is (pin == "link")
        assert (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


def test_what_a_trainer_keeps_to_resume_is_left_out(pinned: Settings) -> None:
    run = Path(pinned.checkpoints)
    kept = (
        "latest_checkpointed_iteration.txt",
        "global_step_10/actor/model_world_size_1_rank_0.pt",
        "global_step_10/actor/huggingface/config.json",
        "step_25/policy/weights/model/shard-00001-model-00001-of-00001.safetensors",
        "step_30/model.safetensors",
        "step_30/STABLE",
        "checkpoint-40/.metadata",
        "checkpoint-40/adapter_model.safetensors",
    )
    left_out = (
        "global_step_10/data.pt",
        "global_step_10/critic/model_world_size_1_rank_0.pt",
        "global_step_10/actor/optim_world_size_1_rank_0.pt",
        "global_step_10/actor/extra_state_world_size_1_rank_0.pt",
        "step_25/policy/optimizer/__0_0.distcp",
        "checkpoint-40/optimizer.pt",
        "checkpoint-40/scheduler.pt",
        "checkpoint-40/rng_state_0.pth",
        "checkpoint-40/.tmpA1b2C3",
        "step_30/tmp-rank0-00001-of-00002.safetensors",
        "tmp_step_50/model.safetensors",
        "notes.txt",
    )
    for name in (*kept, *left_out):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(name)
    twice(Pins(pinned))
    assert tree(pinned.pins).keys() == set(kept)


def test_a_step_that_is_pinned_while_it_is_written_becomes_whole(
    pinned: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    base = open_base(write_checkpoint(0))
    write_checkpoint(10)
    whole = tree(live(pinned, 10))
    shutil.rmtree(live(pinned, 10))
    live(pinned, 10).mkdir()
    pins = Pins(pinned)
    states = []
    with (live(pinned, 10) / "model.safetensors").open("wb") as file:
        for start in range(0, len(whole["model.safetensors"]), 50):
            file.write(whole["model.safetensors"][start : start + 50])
            file.flush()
            twice(pins)
            states.append(scan(pinned.pins, base, now=time.time())[0].state)
    (live(pinned, 10) / "trainer_state.json").write_text("{}")
    twice(pins)
    shutil.rmtree(live(pinned, 10))
    assert set(states) == {State.NOT_YET}
    assert scan(pinned.pins, base, now=time.time())[0].state is State.READY


def test_a_step_that_is_written_again_takes_its_old_pins_with_it(
    pinned: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    pins = Pins(pinned)
    write_checkpoint(10)
    twice(pins)
    shutil.rmtree(live(pinned, 10))
    live(pinned, 10).mkdir()
    (live(pinned, 10) / "config.json").write_text('{"new": 1}')
    twice(pins)
    assert tree(pinned.pins) == {"checkpoint-10/config.json": b'{"new": 1}'}


def test_a_new_file_with_the_times_of_the_old_one_is_another_file(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    own = settings.model_copy(update={"pin": "link"})
    pins = Pins(own)
    write_checkpoint(10)
    pins.refresh()
    file = live(own, 10) / "model.safetensors"
    before = file.stat()
    new = file.with_name("new")
    new.write_bytes(b"y" * before.st_size)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.rename(file)
    pins.refresh()
    assert (own.pins / "checkpoint-10" / file.name).read_bytes() == b"y" * before.st_size


def test_a_file_that_grows_is_copied_when_it_has_stopped(settings: Settings) -> None:
    own = settings.model_copy(update={"pin": "copy"})
    live(own, 10).mkdir(parents=True)
    pins = Pins(own)
    with (live(own, 10) / "model.safetensors").open("wb") as file:
        for _ in range(3):
            file.write(b"x" * 100)
            file.flush()
            pins.refresh()
            assert tree(own.pins) == {}
    pins.refresh()
    assert tree(own.pins) == {"checkpoint-10/model.safetensors": b"x" * 300}


def test_pins_of_an_older_segment_go_once_the_trainer_has_none_of_them(
    pinned: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    pins = Pins(pinned)
    for step in (0, 10, 20, 30, 40):
        write_checkpoint(step)
    twice(pins)
    for step in (10, 20, 30):
        shutil.rmtree(live(pinned, step))
    time.sleep(0.01)
    write_checkpoint(20)
    twice(pins)
    said = look(pinned, pins)
    assert "steps 30, 40 were left behind by a run that resumed before them" in said
    # The trainer still has 40, and may write it again.
    assert {path.name for path in pinned.pins.iterdir()} == {f"checkpoint-{step}" for step in (10, 20, 40)}
    shutil.rmtree(live(pinned, 40))
    look(pinned, pins)
    assert {path.name for path in pinned.pins.iterdir()} == {f"checkpoint-{step}" for step in (10, 20)}


def test_a_hole_is_not_copied_as_zeros(settings: Settings) -> None:
    own = settings.model_copy(update={"pin": "copy"})
    live(own, 10).mkdir(parents=True)
    file = live(own, 10) / "model.safetensors"
    with file.open("wb") as opened:
        opened.truncate(1 << 20)
    pins = Pins(own)
    twice(pins)
    assert tree(own.pins) == {}
    file.write_bytes(b"x" * (1 << 20))
    twice(pins)
    assert tree(own.pins) == {"checkpoint-10/model.safetensors": b"x" * (1 << 20)}


def test_a_link_that_leads_out_is_still_refused(pinned: Settings, write_checkpoint: WriteCheckpoint) -> None:
    base = open_base(write_checkpoint(0))
    write_checkpoint(10)
    file = live(pinned, 10) / "model.safetensors"
    elsewhere = Path(pinned.checkpoints).parent / "elsewhere.safetensors"
    file.rename(elsewhere)
    file.symlink_to(elsewhere)
    twice(Pins(pinned))
    (checkpoint,) = scan(pinned.pins, base, now=time.time())
    assert "outside of it" in checkpoint.reason


def test_another_file_system_is_one_line_with_the_way_out(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == Path(settings.state).parent.stat().st_dev:
        pytest.skip("there is only one file system")
    write_checkpoint(10)
    with tempfile.TemporaryDirectory(dir=shared_memory) as elsewhere:
        away = settings.model_copy(update={"state": Path(elsewhere), "pin": "link"})
        with pytest.raises(PinError, match=r"link: Invalid cross-device link\)\. Set pin: copy, or state: to a dir"):
            Pins(away).refresh()
        copied = away.model_copy(update={"pin": "copy"})
        twice(Pins(copied))
        assert tree(copied.pins / "checkpoint-10") == tree(live(settings, 10))


def test_a_remote_store_cannot_be_pinned(config: Path) -> None:
    config.write_text(config.read_text().replace("checkpoints: run", "checkpoints: s3://bucket/run\npin: link"))
    with pytest.raises(ConfigError, match="pin is link and checkpoints is s3://bucket/run, which is no directory of"):
        load_settings(config)


def look(settings: Settings, pins: Pins) -> str:
    said = []
    _look(settings, pins, lambda _, text: said.append(text))
    return said[-1]


def test_a_step_that_vanished_before_it_was_whole_is_named_with_the_knob(
    settings: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    own = settings.model_copy(update={"pin": "link"})
    pins = Pins(own)
    write_checkpoint(0)
    write_checkpoint(10)
    torn = write_checkpoint(20)
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:60])
    make_old(torn)
    pins.refresh()
    shutil.rmtree(torn)
    write_checkpoint(40)
    said = look(own, pins)
    assert "steps 20 were removed before they were whole: no decision on this window. Raise save_total_limit" in said


def test_the_window_is_predicted_from_the_pins_alone(pinned: Settings, write_checkpoint: WriteCheckpoint) -> None:
    pins = Pins(pinned)
    for step in (0, 10, 25, 40):
        write_checkpoint(step)
        twice(pins)
        if step:
            shutil.rmtree(live(pinned, step))
    write_checkpoint(60)
    assert "window full" in look(pinned, pins)
    (key,) = read_ledger(pinned).windows
    prediction = predict(pinned, [10, 25, 40], key)
    models = [prediction.observed, *prediction.candidates]
    base, last = (load_file(Path(path) / "model.safetensors")["weight"] for path in (pinned.base, models[0].directory))
    predicted = load_file(Path(models[1].directory) / "model.safetensors")["weight"]
    torch.testing.assert_close(predicted - base, (last - base) * (models[1].step / 40), rtol=1e-3, atol=1e-5)


def test_pins_go_with_the_decision_and_are_not_made_again(pinned: Settings, write_checkpoint: WriteCheckpoint) -> None:
    for step in (0, 10, 25, 40):
        write_checkpoint(step)
    pins = Pins(pinned)
    twice(pins)
    look(pinned, pins)
    (key,) = read_ledger(pinned).windows
    refuse(pinned, key)
    look(pinned, pins)
    # Killed between the ledger and the deletion.
    assert pinned.pins.exists()
    again = Pins(pinned, released=bool(read_ledger(pinned).released))
    assert "is decided, its pins are released" in look(pinned, again)
    write_checkpoint(60)
    look(pinned, again)
    with again.kept_fresh():
        time.sleep(0.3)
    assert not pinned.pins.exists()
    assert list(read_ledger(pinned).windows) == [key]


def test_a_run_that_writes_into_a_decided_window_is_pinned_anew(
    pinned: Settings, write_checkpoint: WriteCheckpoint
) -> None:
    for step in (0, 10, 25, 40):
        write_checkpoint(step)
    pins = Pins(pinned)
    twice(pins)
    look(pinned, pins)
    (key,) = read_ledger(pinned).windows
    refuse(pinned, key)
    for _ in range(2):
        look(pinned, pins)
    time.sleep(0.01)
    for step in (25, 40):
        shutil.rmtree(live(pinned, step))
        write_checkpoint(step)
        look(pinned, pins)
        twice(pins)
    look(pinned, pins)
    assert [path.name for path in sorted(pinned.pins.iterdir())] == ["checkpoint-10", "checkpoint-25", "checkpoint-40"]
    assert len(read_ledger(pinned).windows) == 2


def test_a_wider_window_after_the_decision_is_pinned_anew(pinned: Settings, write_checkpoint: WriteCheckpoint) -> None:
    for step in (0, 10, 25, 40):
        write_checkpoint(step)
    pins = Pins(pinned)
    twice(pins)
    look(pinned, pins)
    refuse(pinned, next(iter(read_ledger(pinned).windows)))
    for _ in range(2):
        look(pinned, pins)
    wider = pinned.model_copy(update={"window": 60})
    shutil.rmtree(live(pinned, 10))
    again = Pins(wider, released=True)
    twice(again)
    said = look(wider, again)
    assert (
        "steps 10 were observed and have been removed: no decision on this window. Raise save_total_limit, and" in said
    )
    assert {path.name for path in wider.pins.iterdir()} <= {"checkpoint-25", "checkpoint-40"}


def test_the_watcher_pins_while_it_waits(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    own = settings.model_copy(update={"pin": "link", "poll_seconds": 8.0})
    write_checkpoint(0)
    pinned_at: list[float] = []

    def train() -> None:
        for step in (10, 20, 25, 40):
            write_checkpoint(step)
            # The next look comes after 8 s.
            while time.monotonic() < began + 60 and not (own.pins / f"checkpoint-{step}").exists():
                time.sleep(0.01)
            pinned_at.append(time.monotonic() - began)
            # A checkpoint is linked file by file.
            time.sleep(0.4)
            shutil.rmtree(live(own, step))

    trainer = threading.Thread(target=train)
    began = time.monotonic()
    trainer.start()
    watch_store(own, seconds=9.0)
    trainer.join()
    assert max(pinned_at) < 8
    assert not list(Path(own.checkpoints).iterdir())
    assert [path.name for path in sorted(own.pins.iterdir())] == [f"checkpoint-{step}" for step in (10, 20, 25, 40)]


def test_the_next_watcher_waits_for_this_one(settings: Settings, write_checkpoint: WriteCheckpoint) -> None:
    own = settings.model_copy(update={"pin": "link", "poll_seconds": 0.2})
    write_checkpoint(0)
    first = threading.Thread(target=watch_store, args=(own,), kwargs={"seconds": 1.5})
    first.start()
    while not (own.home / "watcher.lock").exists():
        time.sleep(0.01)
    began = time.monotonic()
    watch_store(own, seconds=3.0, patience=60.0)
    first.join()
    # It ends at its own time, and waited for the first, not for its patience.
    assert 1.0 <= time.monotonic() - began < 60
