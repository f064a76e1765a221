"""A server that speaks the Hub's API, its repositories made in the test: refs, revisions, trees in pages, commits.

A repository is a model or, when its name begins with datasets/, a data set. Large files are redirected to an address of
their own that is signed and expires, as the Hub does it.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_only-a-test"
PAGE = 3
_LFS_BYTES = 1000
_NAME = "(?:datasets/)?[^/]+/[^/]+"


@dataclass
class Repository:
    """Branches and commits; `access` is public, private or gated."""

    access: str = "public"
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: Mapping[str, bytes], *, branch: str = "main") -> str:
        """Let `branch` have these files and nothing else; return the commit."""
        content = json.dumps([[name, hashlib.sha1(data).hexdigest()] for name, data in sorted(files.items())])
        sha = hashlib.sha1(f"{len(self.commits)} {content}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha


@dataclass
class Hub:
    """The repositories by name, what was asked, and how often a signed address may be used."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    uses: int = 1 << 30
    signatures: dict[str, int] = field(default_factory=dict)
    leaked: list[str] = field(default_factory=list)
    large: dict[str, bytes] = field(default_factory=dict)

    def make(self, name: str, *, access: str = "public") -> Repository:
        """Make a repository with an empty main branch."""
        made = self.repositories[name] = Repository(access)
        made.commit({".gitattributes": b""})
        return made


def files(directory: Path, prefix: str = "") -> dict[str, bytes]:
    """Return every file below a directory by its path, for a commit."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {prefix + str(path.relative_to(directory)): path.read_bytes() for path in paths}


@contextmanager
def serve() -> Iterator[Hub]:
    """Yield a running Hub."""
    hub = Hub()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            with lock:
                hub.requests.append(self.path)
            url = urlsplit(self.path)
            path, query = unquote(url.path), parse_qs(url.query)
            if match := re.fullmatch(r"/cdn/([0-9a-f]+)", path):
                self._cdn(match[1], query["Signature"][0])
            elif match := re.fullmatch(rf"/api/(?:models/)?({_NAME})/(refs|revision|tree)(?:/(.*))?", path):
                repository = self._repository(match[1])
                if repository is not None:
                    cursor = int(query.get("cursor", ["0"])[0])
                    flat = query.get("recursive") == ["false"]
                    self._api(repository, match[2], match[3], cursor, flat=flat)
            elif match := re.fullmatch(rf"/({_NAME})/resolve/([^/]+)/(.*)", path):
                repository = self._repository(match[1])
                if repository is not None:
                    self._resolve(repository, match[2], match[3])
            else:
                self._refuse(404, "no such page")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                hub.requests.append(self.path)
            path = unquote(urlsplit(self.path).path)
            if path == "/api/validate-yaml":
                self._json({"errors": [], "warnings": []})
            elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self._refuse(401, "")
            elif path == "/api/repos/create":
                self._create(json.loads(content))
            elif match := re.fullmatch(rf"/api/models/({_NAME})/(preupload|commit)/main", path):
                lines = [json.loads(line) for line in content.splitlines()]
                if match[2] == "commit":
                    self._commit(match[1], lines)
                else:
                    self._json({"files": [_upload(each) for each in lines[0]["files"]]})
            elif match := re.fullmatch(rf"/({_NAME})\.git/info/lfs/objects/batch", path):
                objects = json.loads(content)["objects"]
                href = f"http://{self.headers['Host']}/lfs/"
                actions = [{"actions": {"upload": {"href": href + each["oid"]}}} for each in objects]
                self._json({"objects": [each | action for each, action in zip(objects, actions, strict=True)]})
            else:
                self._refuse(404, "no such page")

        def do_PUT(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                hub.requests.append(self.path)
                hub.large[hashlib.sha256(content).hexdigest()] = content
            self._answer(200, b"", {})

        def _create(self, wanted: dict[str, Any]) -> None:
            name = f"{wanted['organization']}/{wanted['name']}"
            known = name in hub.repositories
            if not known:
                hub.make(name, access=wanted.get("visibility", "public"))
            self._answer(409 if known else 200, json.dumps({"url": f"{hub.url}/{name}"}).encode(), {})

        def _commit(self, name: str, lines: list[dict[str, Any]]) -> None:
            repository = hub.repositories[name]
            files = dict(repository.commits[repository.branches["main"]])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "deletedFile":
                    del files[value["path"]]
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                else:
                    files[value["path"]] = base64.b64decode(value["content"])
            sha = repository.commit(files)
            self._json({"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True})

        def _repository(self, name: str) -> Repository | None:
            result = hub.repositories.get(name)
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if result is None or (result.access == "private" and not known):
                # Who is not logged in does not learn which it is.
                self._refuse(404 if known else 401, "RepoNotFound")
                return None
            if result.access == "gated" and not known:
                self._refuse(403, "GatedRepo")
                return None
            return result

        def _api(self, repository: Repository, what: str, revision: str, cursor: int, *, flat: bool) -> None:
            if what == "refs":
                branches = [
                    {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                    for name, sha in repository.branches.items()
                ]
                self._json({"branches": branches, "converts": [], "tags": []})
                return
            folder = ""
            if what == "tree" and revision not in {*repository.branches, *repository.commits}:
                revision, _, folder = revision.partition("/")
            sha = repository.branches.get(revision, revision)
            if sha not in repository.commits:
                self._refuse(404, "RevisionNotFound")
            elif what == "revision":
                self._json({"sha": sha, "id": "whatever", "siblings": []})
            else:
                items = _tree(repository.commits[sha], folder, flat=flat)
                following = f"http://{self.headers['Host']}{urlsplit(self.path).path}?recursive={str(not flat).lower()}"
                link = f'<{following}&cursor={cursor + PAGE}>; rel="next"'
                self._json(items[cursor : cursor + PAGE], {"Link": link} if cursor + PAGE < len(items) else {})

        def _resolve(self, repository: Repository, sha: str, name: str) -> None:
            content = repository.commits.get(sha, {}).get(name)
            if content is None:
                self._refuse(404, "EntryNotFound")
                return
            headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            if len(content) < _LFS_BYTES:
                self._range(content, headers)
                return
            digest = hashlib.sha256(content).hexdigest()
            with lock:
                signature = f"secret-{len(hub.signatures)}"
                hub.signatures[signature] = hub.uses
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
            # Another host name, so that a client sees that it is another place.
            where = f"http://localhost:{server.server_port}/cdn/{digest}?Signature={signature}"
            self._answer(302, b"", headers | linked | {"Location": where})

        def _cdn(self, digest: str, signature: str) -> None:
            with lock:
                if "Authorization" in self.headers:
                    hub.leaked.append(self.path)
                left = hub.signatures.get(signature, 0)
                hub.signatures[signature] = left - 1
            if left <= 0:
                self._refuse(403, "")
                return
            commits = [commit for repository in hub.repositories.values() for commit in repository.commits.values()]
            content = next(
                data for commit in commits for data in commit.values() if hashlib.sha256(data).hexdigest() == digest
            )
            self._range(content, {"ETag": f'"{digest}"'})

        def _range(self, content: bytes, headers: dict[str, str]) -> None:
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if match is None:
                self._answer(200, content, headers)
                return
            part = content[int(match[1]) : int(match[2]) + 1]
            self._answer(206, part, headers | {"Content-Range": f"bytes {match[1]}-{match[2]}/{len(content)}"})

        def _json(self, content: Any, headers: Mapping[str, str] | None = None) -> None:
            self._answer(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

        def _refuse(self, status: int, code: str) -> None:
            self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

        def _answer(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return

    class Server(ThreadingHTTPServer):
        daemon_threads = True

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _tree(held: Mapping[str, bytes], folder: str, *, flat: bool) -> list[dict[str, Any]]:
    inside = f"{folder}/" if folder else ""
    below = {name: content for name, content in sorted(held.items()) if name.startswith(inside)}
    if not flat:
        return [_item(name, content) for name, content in below.items()]
    folders = sorted({name[len(inside) :].split("/")[0] for name in below if "/" in name[len(inside) :]})
    direct = [_item(name, content) for name, content in below.items() if "/" not in name[len(inside) :]]
    return [_folder(inside + name) for name in folders] + direct


def _upload(asked: Mapping[str, Any]) -> dict[str, Any]:
    mode = "lfs" if asked["size"] >= _LFS_BYTES else "regular"
    return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False}


def _folder(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": hashlib.sha1(name.encode()).hexdigest(), "size": 0}


def _item(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": "file",
        "path": name,
        "size": len(content),
        "oid": hashlib.sha1(content).hexdigest(),
    }
    if len(content) >= _LFS_BYTES:
        digest = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
    return entry
