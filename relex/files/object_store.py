"""Object stores (`s3://bucket/prefix`, `gs://…`, whatever fsspec knows): listed by prefix, read by byte ranges.

Endpoint, region and credentials come from where the store's own library looks for them; none is written anywhere.
"""

import contextlib
import errno
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import fsspec

from relex.errors import StoreError, UnreachableError
from relex.files.directory import FileIdentity, Kind

# Which extra of relex brings the library of a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}
# What these libraries raise besides OSError when a store does not answer, or says no.
_RAISED = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("google.auth.exceptions", "GoogleAuthError"),
)


@dataclass(frozen=True)
class ObjectStore:
    """What lies below one location of an object store."""

    location: str

    @property
    def kind(self) -> Kind:
        """Objects appear whole, in any order."""
        return Kind.OBJECTS

    def list(self) -> Mapping[str, FileIdentity]:
        """Ask for every object below the location, a thousand a request; markers of empty directories are none."""
        with self._asking():
            try:
                listed = self._system.find(self._root, detail=True)
            except FileNotFoundError as error:
                if "bucket does not exist" in str(error):
                    raise
                listed = {}
        return {
            path.removeprefix(f"{self._root}/"): _identity(path, info)
            for path, info in listed.items()
            if path.startswith(f"{self._root}/") and not path.endswith("/") and info["type"] == "file"
        }

    def look(self, path: str) -> FileIdentity:
        """Ask for one object as it is now."""
        with self._asking():
            info = self._system.info(f"{self._root}/{path}")
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self.location}/{path}")
        return _identity(path, info)

    def fetch(self, path: str, start: int, stop: int) -> bytes:
        """Return a range of bytes of one object."""
        if start >= stop:
            return b""
        with self._asking():
            try:
                content: bytes = self._system.cat_file(f"{self._root}/{path}", start=start, end=stop)
            except OSError:
                if self.look(path).size > start:
                    raise
                # It got shorter, and stores refuse a range beyond the end.
                return b""
        return content

    def send(self, file: Path | bytes, path: str) -> None:
        """Put one object there, from a file or from bytes; it appears whole."""
        with self._asking():
            if isinstance(file, bytes):
                self._system.pipe_file(f"{self._root}/{path}", file)
            else:
                self._system.put_file(str(file), f"{self._root}/{path}")

    def remove(self, path: str) -> None:
        """Delete one object."""
        with self._asking():
            self._system.rm_file(f"{self._root}/{path}")

    @cached_property
    def _system(self) -> Any:
        protocol = self.location.partition("://")[0]
        try:
            return fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            way = f"pip install 'relex-rlvr[{extra}]'" if extra else f"install what fsspec needs for it ({error})"
            raise StoreError(f"{self.location}: {protocol}:// needs a library that is not installed: {way}.") from error
        except ValueError as error:
            raise StoreError(
                f"{self.location}: {protocol}:// is no kind of store that fsspec knows. Give a directory, hf://, s3://"
                " or gs://."
            ) from error

    @cached_property
    def _root(self) -> str:
        return str(self._system._strip_protocol(self.location)).rstrip("/")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn whatever the store's library raises, but that a file is not there, into one line."""
        try:
            yield
        except FileNotFoundError as error:
            if "bucket does not exist" in str(error):
                raise UnreachableError(f"{self.location}: there is no such bucket. Check the name.") from error
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.location) from error
        except PermissionError as error:
            raise UnreachableError(
                f"{self.location}: access is denied ({_said(error)}). Give credentials where the store's own library"
                " looks for them, such as AWS_PROFILE or ~/.aws/credentials."
            ) from error
        except _failures() as error:
            raise UnreachableError(
                f"{self.location} does not answer ({_said(error)}). Check the address, the credentials and the network,"
                " then run again."
            ) from error


def open_store(location: str) -> ObjectStore:
    """Return the store at a URL; raises StoreError when it holds a password, which would be written to manifests."""
    parts = urlsplit(location)
    if parts.password is not None:
        raise StoreError(
            f"{parts.scheme}://…@{parts.hostname}{parts.path} holds a password. A location is written into manifests:"
            " give credentials where the store's own library looks for them."
        )
    return ObjectStore(location.rstrip("/"))


def _failures() -> tuple[type[Exception], ...]:
    errors: list[type[Exception]] = [OSError]
    for module, name in _RAISED:
        with contextlib.suppress(ImportError):
            errors.append(getattr(importlib.import_module(module), name))
    return tuple(errors)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def _identity(path: str, info: Mapping[str, Any]) -> FileIdentity:
    time = info.get("LastModified") or info.get("mtime") or info.get("updated") or info.get("created")
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    if isinstance(time, datetime):
        time = (time if time.tzinfo is not None else time.replace(tzinfo=UTC)).timestamp()
    # A listing may give fractions of a second, and a look at the same object none.
    version = info.get("ETag") or info.get("etag") or info.get("generation") or ""
    return FileIdentity(path.rpartition("/")[2], int(info["size"]), int(time or 0) * 1_000_000_000, str(version))
