"""Notices, to a receiver on this machine."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Failed

from flows.decide.flow import decide
from flows.drift.flow import drift
from flows.drift.record import Compared, keep
from flows.settings import Settings
from flows.state.failure import keep_failure
from flows.state.ledger import Seen
from flows.state.overtaken import Against, Paired
from flows.state.scored import Scored, keep_scored
from flows.watch import notices
from flows.watch.notices import Notices
from tests.helpers.stopped import configure, decided
from tests.helpers.straight_run import WriteCheckpoint
from tests.helpers.waiting import wait_for


class Receiver(ThreadingHTTPServer):
    """Takes messages; answers 500 as often as it is told to, and none before it is free."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []
        self.taken: list[dict[str, str]] = []
        self.fails = 0
        self.free = threading.Event()
        self.free.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?token=secret"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(content["title"])
        self.server.free.wait(60)
        if self.server.fails:
            self.server.fails -= 1
            self.send_error(500)
            return
        self.server.taken.append(content)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.free.set()
        server.shutdown()


@pytest.fixture
def settings(
    config: Path, receiver: Receiver, write_checkpoint: WriteCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> Settings:
    monkeypatch.setattr(notices, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(notices, "LONGEST_PAUSE", 0.01)
    for step in (0, 10, 20, 25, 40, 60):
        write_checkpoint(step)
    return configure(config, notify=receiver.url)


def titles(receiver: Receiver) -> list[str]:
    return [message["title"] for message in receiver.taken]


def test_a_decision_is_told_once_also_by_the_next_watcher(config: Path, settings: Settings, receiver: Receiver) -> None:
    watcher = Notices(settings)
    assert watcher.look() == []
    decision = decided(config)
    receiver.fails = 2
    wait_for("the message", lambda: bool(watcher.look() is not None and receiver.taken))
    assert titles(receiver) == ["tiny: registered tiny-candidates version 1"]
    assert receiver.taken[0]["message"] == decision.reason
    assert len(receiver.asked) == 3
    told = settings.home / "told.json"
    wait_for("its being kept", lambda: watcher.look() == [] and decision.key in told.read_text())
    for other in (watcher, Notices(settings)):
        other.look()
        assert other._thread is None or not other._thread.is_alive()
    decided(config, window=60, verdict="keep training", winner=None, registered="", reason="it is not shown.")
    later = Notices(settings)
    wait_for("the second", lambda: later.look() is not None and len(receiver.taken) == 2)
    assert titles(receiver)[1] == "tiny: refused, keep training"
    decided(config, window=25, verdict="refused", registered="", reason="it loses elsewhere.")
    wait_for("the third", lambda: later.look() is not None and len(receiver.taken) == 3)
    assert titles(receiver)[2] == "tiny: refused by a guard, keep training"


def test_what_was_decided_before_somebody_asked_to_be_told_is_no_news(
    config: Path, settings: Settings, receiver: Receiver
) -> None:
    decided(config)
    watcher = Notices(settings)
    assert watcher.look() == []
    assert watcher._thread is None
    assert receiver.asked == []


def test_a_receiver_that_does_not_answer_holds_nothing_up(config: Path, settings: Settings, receiver: Receiver) -> None:
    watcher = Notices(settings)
    watcher.look()
    receiver.free.clear()
    decided(config)
    watcher.look()
    wait_for("its being asked", lambda: bool(receiver.asked))
    # Looks come back while it is being asked, and ask nobody twice.
    assert watcher.look() == watcher.look() == []
    assert len(receiver.asked) == 1
    receiver.free.set()
    wait_for("the message", lambda: bool(receiver.taken))


def test_an_address_that_takes_nothing_is_named_without_its_secret(config: Path, settings: Settings) -> None:
    watcher = Notices(settings.model_copy(update={"notify": ["nosuch://token", "http://127.0.0.1:1/secret"]}))
    watcher.look()
    decided(config)
    wait_for("both", lambda: len(watcher.look()) == 2)
    assert watcher.look() == [
        "notify: nosuch://… is no address that apprise knows",
        "notify: http://127.0.0.1 did not take a message; it is sent again",
    ]


def test_a_flow_run_that_failed_is_told_once_however_often_it_fails_so(config: Path, settings: Settings) -> None:
    assert keep_failure in decide.on_failure_hooks
    assert keep_failure in drift.on_failure_hooks
    run = FlowRun(flow_id=uuid4(), name="decide tiny at step 40", parameters={"config": str(config)})
    for error in ("ModelError: 12 MiB are missing", "ModelError: 13 MiB are missing", "WindowError: another window"):
        keep_failure(decide, run, Failed(message=f"Flow run encountered an exception: {error}"))
    (notice,) = notices.due(settings)
    assert notice.title == "tiny: decide tiny at step 40 failed"
    assert notice.text == "ModelError: 13 MiB are missing"
    # A config that was moved since has no state to be told from.
    config.rename(config.with_name("moved.yaml"))
    keep_failure(decide, run, Failed(message="another"))


def test_a_registered_version_that_the_run_has_overtaken_is_told(settings: Settings) -> None:
    pair = Paired("gate", 400, 0.5, 0.744, -0.244, -0.29, -0.2)
    keep(
        settings,
        Compared("key", 40, "relex", 100, 130, None, "tiny-candidates version 1", "accuracy", None, accuracies=(pair,)),
    )
    # A later checkpoint that was scored by itself beats it too: once a version.
    against = Against("tiny-candidates version 1", "relex @ 100", 200, pair)
    keep_scored(settings, Scored(200, Seen("", 1), None, against=against))
    (notice,) = notices.due(settings)
    assert notice.title == "tiny: overtaken"
    assert notice.text.startswith("Real step 130 scores 24.4 points more than tiny-candidates version 1")
