"""A checkpoint's event reaches the server's database, whoever is killed between the announcement and that."""

import json
import time
from pathlib import Path

import pytest
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, temporary_settings

from deploy.local.stack import Stack
from flows.settings import Settings
from flows.state.events import CHECKPOINT_READY, Event, event
from flows.watch import outbox
from tests.helpers.stacks import prefect_settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        training_run="lost",
        checkpoints="run",
        base="base",
        window=40,
        targets="auto",
        selection="selection",
        gate="gate",
        registered_model="lost",
        state=tmp_path,
    )


def _events(settings: Settings) -> list[Event]:
    return [event(CHECKPOINT_READY, settings, str(step), {"step": step}) for step in (10, 20, 25)]


def _kept(settings: Settings) -> list[int]:
    rows = json.loads((settings.home / "outbox.json").read_bytes())
    return sorted(row["payload"]["step"] for row in rows.values())


def test_what_the_server_does_not_show_is_sent_again_and_the_same(servers: Stack, settings: Settings) -> None:
    sent, lost = _events(settings)[:2], _events(settings)[2:]
    with temporary_settings(prefect_settings(servers)):
        for each in sent:
            emit_event(each.name, {"prefect.resource.id": each.resource}, payload=each.payload, id=each.id)
        outbox.keep(settings, [*sent, *lost], now=100.0)
        assert outbox.due(settings, now=105.0) == []
        end = time.monotonic() + 240
        now = 110.0
        while (again := outbox.due(settings, now=now)) != lost:
            assert {each.id for each in again} <= {each.id for each in (*sent, *lost)}
            assert time.monotonic() < end
            time.sleep(0.5)
            now += 10
        assert _kept(settings) == [25]
        # It has been sent again just now: the next time is later.
        assert outbox.due(settings, now=now + 9) == []


def test_while_the_server_does_not_answer_everything_is_kept(settings: Settings) -> None:
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        outbox.keep(settings, _events(settings), now=100.0)
        assert outbox.due(settings, now=200.0) == []
    assert _kept(settings) == [10, 20, 25]


def test_without_a_server_nothing_is_kept(settings: Settings) -> None:
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        outbox.keep(settings, _events(settings), now=100.0)
        assert outbox.due(settings, now=200.0) == []
    assert not (settings.home / "outbox.json").exists()
