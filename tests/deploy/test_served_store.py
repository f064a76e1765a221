import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.candidate import verify
from deploy.errors import RegistryError
from deploy.registry import models, register
from deploy.runs import record
from deploy.store import connect, prepare


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    home = tmp_path_factory.mktemp("served")
    store = prepare(home)
    port = _free_port()
    arguments = {
        "--backend-store-uri": store.tracking_uri,
        "--default-artifact-root": str(store.artifacts),
        "--artifacts-destination": str(home / "proxied"),
        "--host": "127.0.0.1",
        "--port": str(port),
        "--workers": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *(word for pair in arguments.items() for word in pair)],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None
            assert time.monotonic() < deadline
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False).is_success:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def test_through_a_server_the_files_are_still_hard_links(model: Path, server: str) -> None:
    made = register(
        model, name="served", tracking_uri=server, metrics={"accuracy": 0.5}, tags={"verdict": "registered"}
    )
    assert (made.weights / "model.safetensors").samefile(model / "model.safetensors")
    assert not register(model, name="served", tracking_uri=server).created
    (row,) = models("served", tracking_uri=server)
    assert (row.tags, row.metrics) == ({"verdict": "registered"}, {"accuracy": 0.5})
    assert made.url == f"{server}/#/models/served-candidates/versions/1"
    logged = connect(server).get_logged_model(made.logged_model_id)
    assert logged.status == "READY"
    assert json.loads(logged.tags["mlflow.modelVersions"]) == [{"name": "served-candidates", "version": 1}]


def test_what_was_recorded_through_a_server_has_a_page(server: str) -> None:
    recorded = record("served", tracking_uri=server, key="refusal", title="step 240", tags={"verdict": "refused"})
    assert recorded.url is not None
    assert recorded.url.endswith(f"/runs/{recorded.run_id}")
    assert record("served", tracking_uri=server, key="refusal", title="step 240") == recorded


def test_where_the_artifacts_are_remote_they_are_uploaded_once(model: Path, server: str, tmp_path: Path) -> None:
    import mlflow.artifacts

    connect(server).create_experiment("remote", artifact_location="mlflow-artifacts:/remote")
    made = register(model, name="remote", tracking_uri=server)
    assert made.weights == model
    mlflow.set_tracking_uri(server)
    try:
        stored = mlflow.artifacts.download_artifacts(made.model_uri, dst_path=str(tmp_path / "stored"))
    finally:
        mlflow.set_tracking_uri("")
    assert verify(Path(stored) / "model").digest == made.digest
    (row,) = models("remote", tracking_uri=server)
    assert row.weights.startswith("mlflow-artifacts:/remote/models/")
    assert not register(model, name="remote", tracking_uri=server).created


def test_a_server_that_does_not_answer_is_reported_in_seconds_and_one_line(model: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryError) as refusal:
        register(model, name="tiny", tracking_uri=f"http://127.0.0.1:{_free_port()}")
    assert time.monotonic() - started < 20
    assert "\n" not in str(refusal.value)
