"""The MLflow store: where it lies, how it is set up once, and the client that talks to it.

MLflow is imported here and below functions only: `import deploy.tracking` costs nothing.
"""

import contextlib
import hashlib
import os
import re
import shutil
import socket
import stat
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from filelock import FileLock, Timeout

from deploy.errors import RegistryError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

# A registration that must copy a large model holds the lock for as long as the copy takes.
_LOCK_SECONDS = 900
_LOCK_POLL_SECONDS = 0.2
_PLACE = "relex.place"
_OWNER = "relex.owner"


@dataclass(frozen=True)
class LocalStore:
    """A local store: a sqlite database and the absolute directory its artifacts lie under."""

    database: Path
    artifacts: Path

    @property
    def tracking_uri(self) -> str:
        """The URI that MLflow and `connect` take."""
        return f"sqlite:///{self.database}"


def prepare(home: Path) -> LocalStore:
    """Return the local store under `home`, created where it is missing; many processes may call it at once."""
    store = LocalStore(database=home.resolve() / "mlflow.db", artifacts=home.resolve() / "artifacts")
    _prepare(store)
    return store


def connect(tracking_uri: str) -> "MlflowClient":
    """Return a client of `sqlite:////absolute/path` (created where it is missing) or `http(s)://host:port`."""
    if tracking_uri.startswith("sqlite:"):
        database = Path(tracking_uri.removeprefix("sqlite:///"))
        if not database.is_absolute():
            raise RegistryError(f"{tracking_uri} names no absolute path. Write sqlite:////absolute/path/mlflow.db.")
        _prepare(LocalStore(database, database.parent / "artifacts"))
    elif urlparse(tracking_uri).scheme not in ("http", "https"):
        raise RegistryError(f"{tracking_uri} is not a store MLflow serves. Use sqlite:////… or http://host:port.")
    _configure()
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


@contextmanager
def locked_experiment(client: "MlflowClient", name: str, *, seconds: float | None = None) -> Iterator["Experiment"]:
    """Yield the experiment `name`, created where it is missing, alone: one process at a time writes to it.

    It is waited for `seconds`, a quarter of an hour if left out; RegistryError where it is held for longer.

    Where artifacts are a directory, a file lock in it: among all hosts that mount it, as far as its file system locks
    between hosts. Where they are remote, a file lock of this host and a registered model `<name>.lock`, whose name
    MLflow gives out once. Neither binds MLflow's own page.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RegistryError(f"{name!r} is no name for a model. Use letters, digits, '.', '_' and '-'.")
    with refusals(client):
        experiment = _experiment(client, name)
    directory = local_path(experiment.artifact_location)
    if directory is None:
        key = hashlib.sha256(f"{client.tracking_uri} {name}".encode()).hexdigest()[:16]
        directory = own_directory(Path(tempfile.gettempdir()) / f"relex-{os.getuid()}-{key}")
    directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / ".relex.lock")
    patience = _LOCK_SECONDS if seconds is None else seconds
    try:
        lock.acquire(timeout=patience)
    except Timeout as error:
        raise RegistryError(
            f"{lock.lock_file} is still held after {patience} s. Find the process that registers, or end it."
        ) from error
    try:
        remote = local_path(experiment.artifact_location) is None
        held = _lock_model(client, name, directory, seconds=patience) if remote else contextlib.nullcontext()
        with refusals(client), held:
            yield experiment
    finally:
        lock.release()


@contextmanager
def _lock_model(client: "MlflowClient", name: str, place: Path, *, seconds: float) -> Iterator[None]:
    """Hold the registered model `<name>.lock`; the caller holds the file lock of `place`, a directory of this host."""
    from mlflow.exceptions import MlflowException

    # Not the host's name, which two containers may share while each has a directory of its own.
    identity = place / ".relex.place"
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex)
    owner = {_PLACE: identity.read_text(), _OWNER: f"process {os.getpid()} of {socket.gethostname()}"}
    held, deadline = f"{name}.lock", time.monotonic() + seconds
    while True:
        try:
            client.create_registered_model(held, tags=owner, description="Held while relex writes; gone afterwards.")
            break
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        try:
            holder = client.get_registered_model(held).tags
            if holder.get(_PLACE) == owner[_PLACE]:
                # Only who holds the file lock of a place makes its lock here: the one that did is dead.
                client.delete_registered_model(held)
                continue
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            continue
        if time.monotonic() > deadline:
            raise RegistryError(
                f"{held} is still held by {holder.get(_OWNER, 'somebody')} after {seconds} s. If that process is"
                f" gone, delete the registered model {held} in MLflow."
            )
        time.sleep(_LOCK_POLL_SECONDS)
    try:
        yield
    finally:
        client.delete_registered_model(held)


@contextmanager
def refusals(client: "MlflowClient") -> Iterator[None]:
    """Turn what MLflow raises within into a RegistryError of one line."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error).split())
        raise RegistryError(f"MLflow at {client.tracking_uri} refused: {reason}. Is it running?") from error


def own_directory(path: Path) -> Path:
    """Return `path`, a directory that nobody else may enter, made where it is missing.

    RegistryError where anything else is there: in a directory for everybody, anybody may have put it.
    """
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    status = path.lstat()
    if (
        not stat.S_ISDIR(status.st_mode)
        or status.st_uid != os.getuid()
        or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        raise RegistryError(
            f"{path} is not a directory of ours alone ({stat.filemode(status.st_mode)}, user {status.st_uid}; we are"
            f" user {os.getuid()}). Remove it, or set TMPDIR to a directory of your own."
        )
    path.chmod(0o700)
    return path


def page_url(tracking_uri: str, path: str) -> str | None:
    """Return the address of a page of MLflow's UI, or None where no server shows it."""
    return f"{tracking_uri}/#/{path}" if tracking_uri.startswith("http") else None


def local_path(location: str) -> Path | None:
    """Return the directory an artifact location names on this file system, or None where it is remote."""
    parsed = urlparse(location)
    if parsed.scheme not in ("", "file"):
        return None
    return Path(unquote(parsed.path) if parsed.scheme else location)


def _configure() -> None:
    # MLflow reads these while it is imported; with its own defaults a dead server is noticed after four minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def _prepare(store: LocalStore) -> None:
    if store.database.exists():
        return
    _configure()
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store.database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(store.database.with_name(f".{store.database.name}.lock")):
        if store.database.exists():
            return
        # Migrations are not transactional and several first users corrupt the schema; built aside, the database is
        # complete or absent.
        unfinished = store.database.with_name(f".{store.database.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        created = SqlAlchemyStore(  # type: ignore[no-untyped-call]
            f"sqlite:///{unfinished / store.database.name}", str(store.artifacts)
        )
        created._dispose_engine()  # type: ignore[no-untyped-call]
        store.artifacts.mkdir(exist_ok=True)
        (unfinished / store.database.name).replace(store.database)
        unfinished.rmdir()


def _experiment(client: "MlflowClient", name: str) -> "Experiment":
    from mlflow.exceptions import MlflowException

    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        location = None
        if client.tracking_uri.startswith("sqlite:"):
            location = str(Path(client.tracking_uri.removeprefix("sqlite:///")).parent / "artifacts" / name)
        try:
            experiment = client.get_experiment(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            # Another process was faster.
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            experiment = client.get_experiment_by_name(name)
    if experiment is None or experiment.lifecycle_stage != "active":
        raise RegistryError(f"experiment {name} of {client.tracking_uri} is deleted. Restore it in MLflow's UI.")
    return experiment
