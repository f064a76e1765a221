"""What a watcher waits for is said by `relex up`, by `relex status`, on its page and in its log."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, LogFilter, LogFilterLevel
from prefect.client.schemas.objects import Log
from prefect.settings import temporary_settings

from deploy.local import daemon
from deploy.local.stack import Stack
from evaluation.benchmarks.benchmark import write_benchmark
from tests.helpers import cli
from tests.helpers.stacks import prefect_settings
from tests.helpers.straight_run import write_checkpoint, write_config
from tests.helpers.waiting import wait_for


@pytest.fixture
def unwatched(servers: Stack) -> Iterator[Stack]:
    yield servers
    daemon.stop(servers.home, ["watcher-tiny"])


@pytest.mark.slow
def test_up_ends_when_the_watcher_has_looked_and_says_what_it_waits_for(
    tmp_path: Path, unwatched: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path)
    for split in ("selection", "gate"):
        write_benchmark(tmp_path, split, [{"prompt": f"{split} =", "answer": "1"}], max_new_tokens=1)
    said = f"tiny: waiting for {tmp_path / 'base'}: not there; waiting for {tmp_path / 'run'}: not there"
    home = unwatched.home
    status, out, err = cli.relex(capsys, "up", config, "--home", home)
    assert status == 0, err
    assert said in out.splitlines()
    assert said in cli.relex(capsys, "status", "--home", home)[1].splitlines()
    # What the watcher logs is in the log of its process, in the time that takes.
    log = home / "logs" / "watcher-tiny.log"
    wait_for("the warning", lambda: f"waiting for {tmp_path / 'run'}: not there" in log.read_text())
    for step in (0, 10):
        write_checkpoint(tmp_path, step)
    wait_for("the first checkpoint", lambda: "relex.checkpoint.ready" in log.read_text())
    with temporary_settings(prefect_settings(unwatched)), get_client(sync_client=True) as client:

        def announced() -> Log | None:
            lines = client.read_logs(LogFilter(level=LogFilterLevel(ge_=logging.INFO)), limit=200)
            return next((line for line in lines if line.message.startswith("relex.checkpoint.ready")), None)

        line = wait_for("its line in Prefect", announced)
        assert line.name == "flows.watch.watcher"
        assert line.flow_run_id is not None
        shown = ArtifactFilter(key=ArtifactFilterKey(any_=["window-tiny"]))

        def page() -> bool:
            return any(
                "step 10 of window 40" in str(each.description) for each in client.read_artifacts(artifact_filter=shown)
            )

        wait_for("the page", page)
