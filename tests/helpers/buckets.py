"""Training runs in a real S3 server on the loopback interface, that have been quiet for a minute."""

import itertools
import logging
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from tests.helpers.trajectories import Run

KEYS = {"aws_access_key_id": "testing", "aws_secret_access_key": "not-a-real-key", "region_name": "us-east-1"}


@dataclass(frozen=True)
class RemoteRun:
    """Where a base and its training run lie."""

    base: str
    run: str


@dataclass(frozen=True)
class Buckets:
    """A running S3 server: its address and a client of it."""

    url: str
    client: Any

    def make(self) -> str:
        """Make a bucket of a name that was not there before and return the name."""
        name = f"bucket-{next(_numbers)}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, location: str, content: bytes, *, seconds: float = 60.0) -> None:
        """Put an object there, and say of it that it appeared `seconds` ago."""
        bucket, _, key = location.removeprefix("s3://").partition("/")
        self.client.put_object(Bucket=bucket, Key=key, Body=content)
        self.age(location, seconds=seconds)

    def age(self, location: str, *, seconds: float = 60.0) -> None:
        """Say of an object that it appeared `seconds` before it did."""
        bucket, _, key = location.removeprefix("s3://").partition("/")
        stored_object = s3_backends[DEFAULT_ACCOUNT_ID]["aws"].buckets[bucket].keys[key]
        stored_object.last_modified -= timedelta(seconds=seconds)

    def get(self, location: str) -> bytes:
        """Return the bytes of an object."""
        bucket, _, key = location.removeprefix("s3://").partition("/")
        content: bytes = self.client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return content

    def delete(self, location: str) -> None:
        """Delete an object."""
        bucket, _, key = location.removeprefix("s3://").partition("/")
        self.client.delete_object(Bucket=bucket, Key=key)

    def names(self, location: str) -> list[str]:
        """Return the sorted names of what lies below a location."""
        bucket, _, prefix = location.removeprefix("s3://").partition("/")
        objects = self.client.list_objects_v2(Bucket=bucket, Prefix=f"{prefix}/").get("Contents", [])
        return sorted(each["Key"].removeprefix(f"{prefix}/") for each in objects)

    def copy(self, directory: Path, location: str) -> str:
        """Put a directory with everything in it there."""
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(f"{location}/{path.relative_to(directory)}", path.read_bytes())
        return location


def write_s3_run(buckets: Buckets, run: Run) -> RemoteRun:
    """Put a run that was written to disk, of whatever layout, into a bucket of its own, as it is."""
    bucket = f"s3://{buckets.make()}/some/where"
    return RemoteRun(buckets.copy(run.base, f"{bucket}/base"), buckets.copy(run.run, f"{bucket}/run"))


def start() -> tuple[ThreadedMotoServer, Buckets]:
    """Start an S3 server in this process; the caller stops it."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    return server, Buckets(url, boto3.client("s3", endpoint_url=url, **KEYS))


_numbers = itertools.count()
