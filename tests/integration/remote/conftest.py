from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from tests.helpers import buckets as s3
from tests.helpers.buckets import KEYS, Buckets, RemoteRun, write_s3_run
from tests.helpers.hub_server import Hub, serve
from tests.helpers.trajectories import Run, drift, write_run


@pytest.fixture(scope="session")
def moto() -> Iterator[Buckets]:
    """An S3 server in this process."""
    server, buckets = s3.start()
    yield buckets
    server.stop()


@pytest.fixture
def buckets(moto: Buckets, monkeypatch: pytest.MonkeyPatch) -> Iterator[Buckets]:
    """The S3 server, and an environment that leads to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS["aws_access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["aws_secret_access_key"])
    monkeypatch.setenv("AWS_DEFAULT_REGION", KEYS["region_name"])
    # It would remember the address of the test before.
    s3fs.S3FileSystem.clear_instance_cache()
    yield moto
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def local(tmp_path: Path) -> Run:
    """A run of five checkpoints on the disk, what the remote ones are copies of."""
    tmp_path.joinpath("local").mkdir()
    return write_run(tmp_path / "local", drift(), base_shards=2)


@pytest.fixture
def remote(buckets: Buckets, local: Run) -> RemoteRun:
    """The same run in a bucket."""
    return write_s3_run(buckets, local)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub, and a library that knows no other and is not logged in."""
    with serve() as running:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", running.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running
