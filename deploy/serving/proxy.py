"""The one address of a served model: a thin reverse proxy whose engine can be changed while requests run.

A request goes to the engine that is current when it has arrived in full, and stays with it. What is not asked
for in the one spelling of a route of the OpenAI interface never reaches an engine, nor what a foreign page asks for.
"""

import asyncio
import re
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import h11
import httpx
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.serving.naming import NamedEvents, named

# Of one connection, not of the message (RFC 9110, 7.6.1).
_HOP_BY_HOP = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
    *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
# Engines have more: transformers serve loads and drops models at /load_model and /reset, and takes the path of any at
# /v1/audio/transcriptions; vLLM loads adapters.
_MODELS = "/v1/models"
_CHAT = "/v1/chat/completions"
_ASKED = (_CHAT, "/v1/completions", "/v1/embeddings", "/v1/responses")
_ROUTES = {
    "/health": ("GET", "HEAD"),
    _MODELS: ("GET", "HEAD"),
    **dict.fromkeys(_ASKED, ("POST", "OPTIONS")),
}
_TARGET = re.compile(rb"(/[A-Za-z0-9._-]+)+")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_VERSION_HEADER = b"relex-version"
_QUERY_BYTES = 4096
# A prompt of a million tokens is 5 MB.
_BODY_BYTES = 32 * 2**20
_BODY_SECONDS = 60.0
_HEAD_SECONDS = 20.0


@dataclass(frozen=True)
class Served:
    """The version that an engine answers with."""

    name: str
    version: int
    digest: str
    target_step: int
    created_ms: int


class Upstream:
    """An engine's address, with the number of requests that it is answering.

    `chats` is whether its model has a template for chats, or the engine brings one.
    """

    def __init__(self, url: str, served: Served, *, chats: bool = True) -> None:
        self.url = url
        self.served = served
        self.chats = chats
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


class _Refused(Exception):
    """A request that is answered here, with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class HeadTimed(H11Protocol):
    """uvicorn's protocol, which bounds the length of a request's head; this one bounds its time, too."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, and wait so long for its first request."""
        super().connection_made(transport)
        self._time()

    def data_received(self, data: bytes) -> None:
        """Take bytes; from the first of a request to the end of its head no more than the time may pass."""
        super().data_received(data)
        self._time()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait for nothing more."""
        super().connection_lost(exc)
        self._stop()

    def _time(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(_HEAD_SECONDS, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Proxy:
    """An ASGI application that hands requests on to `upstream`; while that is None it answers 503.

    `names` are what clients may call it by, beside the loopback interface's and the address they reached.
    """

    def __init__(self, *, names: Iterable[str] = ()) -> None:
        self.upstream: Upstream | None = None
        self._names = {name.lower() for name in (*_LOOPBACK, *names)}
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
            path = _route(scope)
            self._check_names(scope)
            body = await _body(Request(scope, receive))
        except _Refused as refused:
            # What is left of the request is not waited for.
            await _refusal(refused.status, str(refused), {"connection": "close"})(scope, receive, send)
            return
        except ClientDisconnect:
            return
        upstream = self.upstream
        if upstream is None:
            message = "the engine has ended and is started again"
            await _refusal(503, message, {"retry-after": "5"})(scope, receive, send)
        elif path == _MODELS:
            # An engine's own list may be of all it could load.
            await _models(upstream.served)(scope, receive, send)
        elif path == _CHAT and scope["method"] == "POST" and not upstream.chats:
            # An engine of transformers would answer 500.
            message = (
                f"{upstream.served.name} version {upstream.served.version} has no chat template: ask /v1/completions,"
                " or give relex serve one of yours: -- --chat-template FILE"
            )
            await _refusal(400, message)(scope, receive, send)
        else:
            with upstream.request():
                await _unless_disconnected(receive, self._relay(upstream, scope, body, receive, send))

    def _check_names(self, scope: Scope) -> None:
        """Refuse a request that reached us under a stranger's name, or that a stranger's page makes a browser send."""
        # A name that a page had resolved to this address makes the page's requests look like its own server's.
        known = {*self._names, scope["server"][0].lower()}
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if [_host(value) in known for value in given] != [True]:
            raise _Refused(
                403, f"{', '.join(given) or 'no host'} is not a name of this server; relex serve --allow-host adds one"
            )
        for origin in (value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"):
            if _host(origin.removeprefix("http://").removeprefix("https://")) not in known:
                raise _Refused(403, f"pages of {origin} are not let in; relex serve --allow-host adds their host")

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
            await _refusal(502, f"the engine gave no answer ({type(error).__name__})")(scope, receive, send)
            return
        version = (_VERSION_HEADER, str(upstream.served.version).encode())
        name = upstream.served.name
        kind = _kind(answer) if scope["method"] == "POST" else ""
        events = NamedEvents(name) if kind == "text/event-stream" else None
        try:
            head = [*_passed_on(answer.headers.raw, but=(b"content-length",) if kind else ()), version]
            whole = b""
            if kind == "application/json":
                whole = named(b"".join([chunk async for chunk in answer.aiter_raw()]), name)
                head.append((b"content-length", str(len(whole)).encode()))
            await send({"type": "http.response.start", "status": answer.status_code, "headers": head})
            if kind == "application/json":
                await send({"type": "http.response.body", "body": whole, "more_body": False})
                return
            async for chunk in answer.aiter_raw():
                passed = chunk if events is None else events.feed(chunk)
                if passed:
                    await send({"type": "http.response.body", "body": passed, "more_body": True})
            last = b"" if events is None else events.end()
            await send({"type": "http.response.body", "body": last, "more_body": False})
        except httpx.TransportError:
            # The status is out: the client is told by the connection, which is closed in the middle of the answer.
            return
        finally:
            await answer.aclose()


def _kind(answer: httpx.Response) -> str:
    """Return what an answer is in which the model is named, "" where it is nothing of the kind or is compressed."""
    kind = str(answer.headers.get("content-type", "")).partition(";")[0].strip().lower()
    plain = answer.headers.get("content-encoding", "identity") == "identity"
    return kind if plain and kind in ("application/json", "text/event-stream") else ""


def _route(scope: Scope) -> str:
    """Return the route that is asked for; _Refused where it is none of ours or written in any but its one spelling."""
    # As it came, not as uvicorn decodes it: an engine may decode it once more.
    target = scope["raw_path"]
    plain = _TARGET.fullmatch(target) and not {b".", b".."} & set(target.split(b"/"))
    if not plain or len(scope["query_string"]) > _QUERY_BYTES:
        raise _Refused(400, "the target of the request is no plain path, or its query is long")
    path = str(target.decode())
    if path not in _ROUTES:
        raise _Refused(404, f"{path} is not served; what is: {', '.join(_ROUTES)}")
    if scope["method"] not in _ROUTES[path]:
        raise _Refused(405, f"{path} takes {' and '.join(_ROUTES[path])}")
    return path


def _host(authority: str) -> str | None:
    """Return the host of HOST or HOST:PORT in small letters, an IPv6 address without brackets; None where it is odd."""
    match = _HOST.fullmatch(authority)
    return match[1].strip("[]").lower() if match else None


async def _body(request: Request) -> bytes:
    """Return the body; _Refused where it is too long or takes too long."""
    too_long = _Refused(413, f"a request may have {_BODY_BYTES} bytes")
    # h11 has seen to it that this is digits.
    if int(request.headers.get("content-length", 0)) > _BODY_BYTES:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > _BODY_BYTES:
                    raise too_long
    except TimeoutError:
        raise _Refused(408, f"the request was not complete after {_BODY_SECONDS:.0f} s") from None
    return bytes(body)


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


def _refusal(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    # The form that clients of this interface show to people.
    return JSONResponse({"error": {"message": message, "type": "relex", "code": status}}, status, headers=headers)
