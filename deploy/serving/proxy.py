"""The one address of a served model: a thin reverse proxy whose engine can be changed while requests run.

A request goes to the engine that is current when it has arrived in full, and stays with it.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

# Of one connection, not of the message (RFC 9110, 7.6.1).
_HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
    *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
# How transformers serve is told to load another model, or to drop this one: not the client's to say.
_CONTROLS = ("/load_model", "/reset")
_VERSION_HEADER = b"relex-version"


@dataclass(frozen=True)
class Served:
    """The version that an engine answers with."""

    name: str
    version: int
    digest: str
    target_step: int
    created_ms: int


class Upstream:
    """An engine's address, with the number of requests that it is answering."""

    def __init__(self, url: str, served: Served) -> None:
        self.url = url
        self.served = served
        self.requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Count a request while it runs."""
        self.requests += 1
        self._idle.clear()
        try:
            yield
        finally:
            self.requests -= 1
            if not self.requests:
                self._idle.set()

    async def idle(self) -> None:
        """Return when no request runs."""
        await self._idle.wait()


class Proxy:
    """An ASGI application that hands requests on to `upstream`; while that is None it answers 503."""

    def __init__(self) -> None:
        self.upstream: Upstream | None = None
        # A connection a request: one kept open may be closed by the engine while a request is on its way to it.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.AsyncClient(
            trust_env=False, timeout=httpx.Timeout(None, connect=10), limits=limits, follow_redirects=False
        )

    async def aclose(self) -> None:
        """Close what is open to engines."""
        await self._client.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        try:
            body = await Request(scope, receive).body()
        except ClientDisconnect:
            return
        upstream, path = self.upstream, scope["path"]
        if upstream is None:
            await _refusal(503, "the engine has ended and is started again")(scope, receive, send)
        elif path in _CONTROLS:
            await _refusal(404, f"{path} is not served")(scope, receive, send)
        elif path == "/v1/models":
            # An engine's own list may be of all it could load.
            await _models(upstream.served)(scope, receive, send)
        else:
            with upstream.request():
                await _unless_disconnected(receive, self._relay(upstream, scope, body, receive, send))

    async def _relay(self, upstream: Upstream, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        target = httpx.URL(upstream.url).copy_with(
            raw_path=scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        )
        headers = _passed_on(scope["headers"], but=(b"content-length", b"expect"))
        # Made by itself, a request has the client's headers and none of httpx's own.
        request = httpx.Request(scope["method"], target, headers=headers, content=body or None)
        try:
            answer = await self._client.send(request, stream=True)
        except httpx.TransportError as error:
            reason = f"the engine gave no answer ({type(error).__name__})"
            await _refusal(502, reason)(scope, receive, send)
            return
        try:
            version = (_VERSION_HEADER, str(upstream.served.version).encode())
            await send(
                {
                    "type": "http.response.start",
                    "status": answer.status_code,
                    "headers": [*_passed_on(answer.headers.raw), version],
                }
            )
            async for chunk in answer.aiter_raw():
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except httpx.TransportError:
            # The status is out: the client is told by the connection, which is closed in the middle of the answer.
            return
        finally:
            await answer.aclose()


async def _unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Finish the work, or drop it when the client has gone: the engine then stops generating, too."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    if not tasks[0].cancelled():
        tasks[0].result()


def _passed_on(headers: Iterable[tuple[bytes, bytes]], *, but: Iterable[bytes] = ()) -> list[tuple[bytes, bytes]]:
    headers = list(headers)
    named = {
        token.strip().lower() for name, value in headers if name.lower() == b"connection" for token in value.split(b",")
    }
    return [(name, value) for name, value in headers if name.lower() not in {*_HOP_BY_HOP, *named, *but}]


def _models(served: Served) -> JSONResponse:
    model = {"id": served.name, "object": "model", "created": served.created_ms // 1000, "owned_by": "relex"}
    return JSONResponse({"object": "list", "data": [{**asdict(served), **model}]})


def _refusal(status: int, message: str) -> JSONResponse:
    # The form that clients of this interface show to people.
    content = {"error": {"message": message, "type": "relex", "code": status}}
    return JSONResponse(content, status, headers={"retry-after": "5"} if status == 503 else None)
