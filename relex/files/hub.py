"""The Hugging Face Hub: `hf://org/repo`, `hf://org/repo@revision`, and a folder in either.

What is given by a branch is pinned to the commit it has when it is looked at, and read by that commit from then on, so
a location says which bytes they are. Of a repository as a whole the directories are the folders of its main branch and
its other branches: runs are pushed as one or the other.
"""

import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote

import httpx2
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

from relex.errors import StoreError, UnreachableError
from relex.files.block_cache import BlockCache
from relex.files.directory import FileIdentity, Kind
from relex.files.remote import RemoteDirectory

SCHEME = "hf://"

_LOCATION = re.compile(r"hf://([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAIN = "main"

_TIMEOUT_SECONDS = 30.0
# What is asked once by somebody who waits, and what a long pass depends on.
_RETRIES_ASKING = 2
_RETRIES_READING = 6


@dataclass(frozen=True)
class Commit:
    """One commit of a repository, from the folder `prefix` ("" or "a/b/") down."""

    endpoint: str
    repository: str
    sha: str
    prefix: str = ""
    # Where the Hub redirects a large file to: its own address is asked for once, since it counts what it is asked.
    addresses: dict[str, str] = field(default_factory=dict, compare=False, repr=False)

    @property
    def kind(self) -> Kind:
        """A commit is there at once."""
        return Kind.COMMIT

    def list(self) -> Mapping[str, FileIdentity]:
        """Return every file of the commit below the folder."""
        files = _files(self.endpoint, self.repository, self.sha)
        return {path.removeprefix(self.prefix): file for path, file in files.items() if path.startswith(self.prefix)}

    def look(self, path: str) -> FileIdentity:
        """Return what the commit says of one file: it cannot change."""
        return _files(self.endpoint, self.repository, self.sha)[self.prefix + path]

    def fetch(self, path: str, start: int, stop: int) -> bytes:
        """Return a range of bytes of one file."""
        if start >= stop:
            return b""
        where = f"{SCHEME}{self.repository}@{self.sha}/{self.prefix}{path}"
        asked = f"{self.endpoint}/{self.repository}/resolve/{self.sha}/{quote(self.prefix + path)}"
        address = self.addresses.get(path, asked)
        response = _get(address, where, endpoint=self.endpoint, span=(start, stop))
        if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN) and address != asked:
            # Such addresses are valid for a while only.
            response = _get(asked, where, endpoint=self.endpoint, span=(start, stop))
        _check(response, where)
        self.addresses[path] = str(response.url)
        return response.content if response.status_code == HTTPStatus.PARTIAL_CONTENT else response.content[start:stop]


@dataclass(frozen=True)
class Repository(RemoteDirectory):
    """The root of a repository: its main branch, and its other branches as directories beside the folders."""

    branches: Mapping[str, str] = field(default_factory=dict, compare=False)

    def children(self) -> tuple[str, ...]:
        """Return the sorted names of folders and branches."""
        both = sorted(self.branches.keys() & self.tree.trees.keys())
        if both:
            raise StoreError(f"{self.location} has both a folder and a branch {both[0]}. Give the one: @{both[0]}.")
        return tuple(sorted(self.branches.keys() | self.tree.trees.keys()))

    def enter(self, name: str) -> RemoteDirectory:
        """Return the folder, or the branch at the commit it had when the repository was looked at."""
        if name not in self.branches:
            return super().enter(name)
        assert isinstance(self.store, Commit)
        commit = Commit(self.store.endpoint, self.store.repository, self.branches[name])
        return RemoteDirectory(_pinned(commit), commit, self.blocks)


def open_hub(location: str, *, blocks: BlockCache | None) -> RemoteDirectory:
    """Return the directory at `hf://org/repo[@revision][/folder]`, pinned to a commit.

    Raises StoreError when the location is written otherwise, UnreachableError when the Hub has no such repository or
    revision, does not let us in, or does not answer.
    """
    match = _LOCATION.fullmatch(location.rstrip("/"))
    if match is None:
        raise StoreError(f"{location} is not written as hf://org/repo, hf://org/repo@revision or with a folder after.")
    repository, revision, folder = match[1], match[2], match[3]
    endpoint = HfApi().endpoint
    prefix = f"{folder}/" if folder else ""
    if revision is None and not prefix:
        branches = _branches(endpoint, repository)
        commit = Commit(endpoint, repository, branches.pop(_MAIN))
        return Repository(_pinned(commit), commit, blocks, branches=branches)
    sha = revision if revision and _COMMIT.fullmatch(revision) else _resolve(endpoint, repository, revision or _MAIN)
    commit = Commit(endpoint, repository, sha, prefix)
    return RemoteDirectory(_pinned(commit), commit, blocks)


def _pinned(commit: Commit) -> str:
    return f"{SCHEME}{commit.repository}@{commit.sha}" + (f"/{commit.prefix.rstrip('/')}" if commit.prefix else "")


def _branches(endpoint: str, repository: str) -> dict[str, str]:
    refs = _ask(f"{endpoint}/api/models/{repository}/refs", SCHEME + repository, endpoint=endpoint).json()
    return {branch["name"]: branch["targetCommit"] for branch in refs["branches"]}


def _resolve(endpoint: str, repository: str, revision: str) -> str:
    named = quote(unquote(revision), safe="")
    url = f"{endpoint}/api/models/{repository}/revision/{named}"
    return str(_ask(url, f"{SCHEME}{repository}@{revision}", endpoint=endpoint).json()["sha"])


@lru_cache(maxsize=1024)  # a commit never changes, and a watcher looks at every branch every few seconds
def _files(endpoint: str, repository: str, sha: str) -> Mapping[str, FileIdentity]:
    where = f"{SCHEME}{repository}@{sha}"
    url = f"{endpoint}/api/models/{repository}/tree/{sha}?recursive=true"
    return {
        entry["path"]: FileIdentity(
            entry["path"].rpartition("/")[2], entry["size"], 0, (entry.get("lfs") or {}).get("oid") or entry["oid"]
        )
        for entry in _pages(url, where, endpoint=endpoint)
        if entry["type"] == "file"
    }


def _pages(url: str, where: str, *, endpoint: str) -> Iterator[dict[str, Any]]:
    following: str | None = url
    while following is not None:
        response = _ask(following, where, endpoint=endpoint)
        yield from response.json()
        following = response.links.get("next", {}).get("url")


def _ask(url: str, where: str, *, endpoint: str) -> httpx2.Response:
    response = _get(url, where, endpoint=endpoint)
    _check(response, where)
    return response


def _get(url: str, where: str, *, endpoint: str, span: tuple[int, int] | None = None) -> httpx2.Response:
    # A token is for the Hub, not for where it redirects to.
    headers = build_hf_headers() if url.startswith(f"{endpoint}/") else {}
    if span is not None:
        headers |= {"Range": f"bytes={span[0]}-{span[1] - 1}", "Accept-Encoding": "identity"}
    retries = _RETRIES_ASKING if span is None else _RETRIES_READING
    try:
        return http_backoff("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, max_retries=retries)
    except (OSError, httpx2.HTTPError) as error:
        raise _unreachable(where, error) from None


def _check(response: httpx2.Response, where: str) -> None:
    try:
        hf_raise_for_status(response)
    except (OSError, httpx2.HTTPError) as error:
        raise _unreachable(where, error) from None


def _unreachable(where: str, error: Exception) -> Exception:
    """Return what to raise; an error's own text may hold a signed address, so only its status is repeated."""
    if isinstance(error, EntryNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), where)
    if isinstance(error, GatedRepoError):
        return UnreachableError(f"{where} is gated: accept its conditions on the Hub, then log in with hf auth login.")
    if isinstance(error, RepositoryNotFoundError):
        return UnreachableError(
            f"{where}: the Hub has no such repository, or it is private. Check the name, or log in with hf auth login."
        )
    if isinstance(error, RevisionNotFoundError):
        return UnreachableError(
            f"{where}: the repository has no such revision. Give one of its branches, tags or commits."
        )
    said = f"HTTP {error.response.status_code}" if isinstance(error, HfHubHTTPError) else type(error).__name__
    return UnreachableError(
        f"{where}: the Hub does not answer ({said}). Check the network, HF_ENDPOINT and HF_HUB_OFFLINE, then run again."
    )
