"""The command line and the watcher's functions, with everything in stores."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from prefect.events.clients import NullEventsClient
from prefect.events.worker import EventsWorker
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.decide.predict import predict
from flows.decide.stages import fetch_base
from flows.settings import load_settings
from flows.state.ledger import read_ledger
from flows.watch.watcher import watch_store
from relex.files.block_cache import BlockCache
from relex.output import manifest
from tests.helpers import cli
from tests.helpers.buckets import Buckets, RemoteRun
from tests.helpers.hub_server import Hub, files
from tests.helpers.trajectories import STEPS, TARGET, Run, content, tree

Relex = Callable[..., tuple[int, str, str]]


@pytest.fixture
def on_hub(hub: Hub, local: Run) -> str:
    """The base on the Hub."""
    hub.make("org/base").commit(files(local.base))
    return "hf://org/base"


@pytest.fixture(autouse=True)
def no_server() -> Iterator[None]:
    """Events go nowhere, instead of to a server that would be started for them."""
    EventsWorker.set_client_override(NullEventsClient)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        yield
    EventsWorker.set_client_override(None)


@pytest.fixture
def relex(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Relex:
    """Run the command line in this process; returns exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return cli.relex(capsys, *arguments, "--json")

    return run


def test_the_commands_read_from_a_bucket_and_the_hub_and_write_to_a_bucket(
    relex: Relex, buckets: Buckets, remote: RemoteRun, on_hub: str, tmp_path: Path
) -> None:
    common = [remote.run, "--base", on_hub, "--memory", "64MiB", "--cache", str(tmp_path / "cache")]
    status, looked, told = relex("inspect", *common)
    assert status == 0, told
    steps = json.loads(looked)["steps"]
    assert [(step["step"], step["state"]) for step in steps] == [(step, "ready") for step in STEPS]
    out = f"s3://{buckets.make()}/predicted"
    status, made, said = relex("extrapolate", *common, "--target-step", str(TARGET), "--out", out)
    assert status == 0, said
    assert json.loads(made)[0]["base"].startswith("hf://org/base@")
    assert manifest.read(f"{out}/step-{TARGET}").forecast.steps == STEPS
    # The Gram is kept; of what was read and written nothing is.
    assert {name.partition("/")[0] for name in tree(tmp_path / "cache")} == {"grams", "staging"}
    assert tree(tmp_path / "cache" / "staging") == set()
    assert "not-a-real-key" not in looked + told + made + said


def test_a_store_that_does_not_exist_is_one_line(relex: Relex, remote: RemoteRun, on_hub: str) -> None:
    for run, base, message in (
        ("s3://no-such-bucket/run", on_hub, "UnreachableError: s3://no-such-bucket/run: there is no such bucket"),
        (remote.run, "hf://org/none", "UnreachableError: hf://org/none: the Hub has no such repository"),
    ):
        status, _, told = relex("inspect", run, "--base", base)
        assert status == 1
        assert told.strip().splitlines()[-1].startswith(f"relex: {message}"), told


def _config(directory: Path, checkpoints: str, base: str) -> Path:
    path = directory / "relex.yaml"
    settings = {
        "training_run": "remote", "checkpoints": checkpoints, "base": base, "window": STEPS[-1], "targets": [TARGET],
        "selection": "selection.yaml", "gate": "gate.yaml", "registered_model": "remote", "memory": "64MiB",
        "cache": "32MiB",
    }  # fmt: skip
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_watched_bucket_is_announced_and_predicted_as_the_same_run_on_disk_is(
    remote: RemoteRun, on_hub: str, local: Run, tmp_path: Path
) -> None:
    config = _config(tmp_path, remote.run, on_hub)
    settings = load_settings(config)
    assert settings.poll_seconds == 30.0
    watch_store(settings, seconds=0.1)
    (key,) = read_ledger(settings).windows
    with BlockCache(settings.home, size=int(settings.cache)) as blocks:
        prediction = predict(settings, STEPS, key, blocks=blocks)
    (tmp_path / "disk").mkdir()
    here = load_settings(_config(tmp_path / "disk", str(local.run), str(local.base)))
    watch_store(here, seconds=0.1)
    expected = predict(here, STEPS, next(iter(read_ledger(here).windows)))
    for ours, theirs in zip(
        (prediction.observed, *prediction.candidates), (expected.observed, *expected.candidates), strict=True
    ):
        assert content(Path(ours.directory)) == content(Path(theirs.directory))
    base = fetch_base(settings)
    assert content(Path(base.directory)) == content(local.base)
    assert Path(base.directory).is_relative_to(settings.home)
    assert fetch_base(settings) == base


class _WindowFullError(Exception):
    """Ends a watcher; one of the file system would be waited for."""


def test_a_watcher_waits_while_a_store_does_not_answer(hub: Hub, remote: RemoteRun, local: Run, tmp_path: Path) -> None:
    settings = load_settings(_config(tmp_path, remote.run, "hf://org/later")).model_copy(update={"poll_seconds": 0.2})
    seen: list[str] = []

    def push() -> None:
        while not seen:
            time.sleep(0.05)
        hub.make("org/later").commit(files(local.base))

    trainer = threading.Thread(target=push, daemon=True)
    trainer.start()

    def look(progress: float, text: str) -> None:
        seen.append(text)
        if text.endswith("window full"):
            raise _WindowFullError

    with pytest.raises(_WindowFullError):
        watch_store(settings, seconds=120.0, on_look=look)
    trainer.join()
    assert seen[0].startswith("remote: waiting: hf://org/later: the Hub has no such repository")
    assert seen[-1].endswith("window full")
