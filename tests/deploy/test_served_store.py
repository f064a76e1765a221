import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy import tracking
from deploy.candidate import verify
from deploy.errors import CandidateError, RegistryError
from deploy.registry import gate_reports, models, register, verified
from deploy.runs import record
from deploy.tracking import connect
from tests.helpers.mlflow_server import free_port, serve
from tests.helpers.predictions import write_prediction

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serve(tmp_path_factory.mktemp("served")) as uri:
        yield uri


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


def test_remote_weights_and_gate_results_are_brought_here_and_verified(server: str, tmp_path: Path) -> None:
    connect(server).create_experiment("far", artifact_location="mlflow-artifacts:/far")
    results = tmp_path / "results.json"
    results.write_text('{"scores": []}')
    register(
        write_prediction(tmp_path / "predicted", number=5), name="far", tracking_uri=server, gate_reports=[results]
    )
    (row,) = models("far", tracking_uri=server)
    assert gate_reports(row, tracking_uri=server) == ['{"scores": []}']
    downloads = tmp_path / "downloads"
    brought = verified(row, tracking_uri=server, downloads=downloads)
    assert brought == downloads / row.digest
    assert verified(row, tracking_uri=server, downloads=downloads) == brought
    (brought / "model.safetensors").write_bytes(b"")
    with pytest.raises(CandidateError, match="far-candidates version 1 is not what was registered"):
        verified(row, tracking_uri=server, downloads=downloads)


def test_where_artifacts_are_remote_a_name_in_mlflow_is_the_lock_and_goes_with_a_dead_process(
    server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect(server)
    client.create_experiment("locked", artifact_location="mlflow-artifacts:/locked")
    with tracking.locked_experiment(client, "locked"):
        held = client.get_registered_model("locked.lock")
    assert [model.name for model in client.search_registered_models("name = 'locked.lock'")] == []
    # One that died here held the file lock too, which went with it.
    client.create_registered_model("locked.lock", tags=held.tags)
    record("locked", tracking_uri=server, key="after", title="")
    assert [model.name for model in client.search_registered_models("name = 'locked.lock'")] == []
    # One elsewhere may be alive.
    client.create_registered_model("locked.lock", tags={"relex.place": "elsewhere", "relex.owner": "process 7 of far"})
    monkeypatch.setattr(tracking, "_LOCK_SECONDS", 0.5)
    with pytest.raises(
        RegistryError, match=r"still held by process 7 of far .* delete the registered model"
    ) as refusal:
        record("locked", tracking_uri=server, key="again", title="")
    assert "\n" not in str(refusal.value)


def test_the_file_lock_of_remote_artifacts_lies_in_a_directory_that_is_ours_alone(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    connect(server).create_experiment("planted", artifact_location="mlflow-artifacts:/planted")
    record("planted", tracking_uri=server, key="first", title="")
    (place,) = tmp_path.iterdir()
    assert place.stat().st_mode & 0o777 == 0o700
    # What anybody can do in a directory for everybody, before we come.
    victim = tmp_path / "victim"
    victim.mkdir()
    shutil.rmtree(place)
    place.symlink_to(victim)
    with pytest.raises(RegistryError, match=rf"{place} is not a directory of ours alone .*TMPDIR") as refusal:
        record("planted", tracking_uri=server, key="second", title="")
    assert "\n" not in str(refusal.value)
    assert list(victim.iterdir()) == []


@pytest.mark.parametrize("planted", ["link", "dangling link", "file", "open to all", "open to the group", "another's"])
def test_what_somebody_else_may_have_planted_is_refused(
    planted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, real = tmp_path / "place", tmp_path / "real"
    real.mkdir(mode=0o700)
    if planted == "link":
        place.symlink_to(real)
    elif planted == "dangling link":
        place.symlink_to(tmp_path / "nowhere")
    elif planted == "file":
        place.touch()
    else:
        place.mkdir(mode=0o700)
        place.chmod({"open to all": 0o1777, "open to the group": 0o770, "another's": 0o700}[planted])
    if planted == "another's":
        stranger = os.getuid() + 1
        monkeypatch.setattr("os.getuid", lambda: stranger)
    with pytest.raises(RegistryError, match="is not a directory of ours alone"):
        tracking.own_directory(place)
    assert not (tmp_path / "nowhere").exists()
    assert list(real.iterdir()) == []


def test_a_directory_of_our_own_is_made_once_and_closed_to_readers(tmp_path: Path) -> None:
    # As an earlier version made it.
    (tmp_path / "place").mkdir(mode=0o755)
    for _ in range(2):
        assert tracking.own_directory(tmp_path / "place").stat().st_mode & 0o777 == 0o700


def test_a_server_that_does_not_answer_is_reported_in_seconds_and_one_line(model: Path) -> None:
    started = time.monotonic()
    with pytest.raises(RegistryError) as refusal:
        register(model, name="tiny", tracking_uri=f"http://127.0.0.1:{free_port()}")
    assert time.monotonic() - started < 20
    assert "\n" not in str(refusal.value)
