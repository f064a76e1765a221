"""A model service: the champion of a registered model answers at one address, whichever version that is.

The alias is looked at every few seconds. When it has moved, the new version is verified and an engine started for it
beside the old one; once it answers, new requests go to it, and the old engine is ended after the requests it has. A
version that is damaged or whose engine does not come up changes nothing, and is tried again after a while. An alias
that somebody moved on MLflow's own page is followed once it is judged and stands.
"""

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import uvicorn

from deploy import registry
from deploy.errors import DeployError, NoSuchVersionError, ServingError
from deploy.local.port import free_port
from deploy.registry import RegisteredModelVersion
from deploy.serving import engine
from deploy.serving.engine import Engine
from deploy.serving.proxy import HeadTimed, Proxy, Served, Upstream

# For answers that run when the service is asked to end, and for those of an engine that was replaced.
_END_SECONDS = 30
_RETIRE_SECONDS = 600.0
_LOOK_SECONDS = 0.01
# What did not come up is tried again, later each time.
_LATEST_RETRY_SECONDS = 600.0


@dataclass(frozen=True)
class Service:
    """What is served, where and by what.

    `engine` is a command, see `deploy.serving.engine.command`, or None for one that is installed; `options` go at its
    end. Logs and names of engines lie in `home`, remote weights in `home`/models. Clients may call it by
    `names`, beside the loopback interface's names, this machine's and the address they reached.
    """

    name: str
    home: Path
    engine: str | None = None
    options: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8000
    names: tuple[str, ...] = ()
    poll_seconds: float = 10.0


@dataclass(frozen=True)
class Notice:
    """One line of what happened: a version answers, what was set in MLflow was judged, or something is wrong.

    Whatever is wrong, what answered goes on.
    """

    kind: Literal["answers", "judged", "trouble"]
    version: int
    text: str


@dataclass(frozen=True)
class _Running:
    row: RegisteredModelVersion
    engine: Engine
    upstream: Upstream
    ending: AsyncExitStack

    @property
    def ended(self) -> bool:
        return self.engine.process.returncode is not None


# Judges what was set on MLflow's own pages since the last time, and says what came of it.
Settle: TypeAlias = Callable[[], Sequence[Notice]]


def serve(
    service: Service, *, tracking_uri: Callable[[], str], on_notice: Callable[[Notice], None], settle: Settle
) -> None:
    """Serve until SIGINT or SIGTERM, then raise KeyboardInterrupt; refuses what `serving` does."""

    async def until_ended() -> None:
        # As at an interrupt, the engines are ended before this process is.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        async with serving(service, tracking_uri=tracking_uri, on_notice=on_notice, settle=settle) as ended:
            await ended

    asyncio.run(until_ended())
    # Asked to end between two steps of the loop, it returns: nothing was left to interrupt.
    raise KeyboardInterrupt


@asynccontextmanager
async def serving(
    service: Service, *, tracking_uri: Callable[[], str], on_notice: Callable[[Notice], None], settle: Settle
) -> AsyncIterator["asyncio.Task[None]"]:
    """Serve the champion of the registry that `tracking_uri` says, and follow it; every engine has ended afterwards.

    What `settle` says is told, first of all and as often as the alias is looked at.

    Yields, once the first engine answers, a task that ends when the server was asked to (SIGTERM, SIGINT). Refuses with
    NoSuchVersionError where there is no champion, CandidateError where it is damaged, and ServingError where the
    address is taken or its engine does not come up.
    """
    with _bound(service) as listener:
        # What hinders it now is told by `_judge`, or hinders all that follows.
        with contextlib.suppress(DeployError):
            for judged in await asyncio.to_thread(settle):
                on_notice(judged)
        row = await _champion(service, tracking_uri)
        async with AsyncExitStack() as ending:
            proxy = Proxy(names=(service.host, socket.gethostname(), *service.names))
            ending.push_async_callback(proxy.aclose)
            follower = _Follower(service, tracking_uri, on_notice, proxy, await _start(service, tracking_uri, row))
            ending.push_async_callback(follower.aclose)
            server = server_of(proxy)
            tasks = [
                asyncio.create_task(server.serve(sockets=[listener])),
                asyncio.create_task(follower.follow()),
                asyncio.create_task(_judge(settle, on_notice, pause=service.poll_seconds)),
            ]
            try:
                while not (server.started or tasks[0].done()):
                    await asyncio.sleep(_LOOK_SECONDS)
                host = f"[{service.host}]" if ":" in service.host else service.host
                url = f"http://{host}:{listener.getsockname()[1]}/v1"
                on_notice(Notice("answers", row.version, f"{_title(row)} answers at {url}"))
                yield asyncio.create_task(_first(tasks))
            finally:
                server.should_exit = True
                for task in tasks[1:]:
                    task.cancel()
                await asyncio.wait(tasks)


class _Follower:
    """Points the proxy to the engine of the champion, and holds the engines."""

    def __init__(
        self,
        service: Service,
        tracking_uri: Callable[[], str],
        on_notice: Callable[[Notice], None],
        proxy: Proxy,
        first: _Running,
    ) -> None:
        self._service = service
        self._tracking_uri = tracking_uri
        self._on_notice = on_notice
        self._proxy = proxy
        self._now = first
        proxy.upstream = first.upstream
        self._retiring: set[asyncio.Task[None]] = set()
        self._last_trouble = ""
        self._failed: int | None = None
        self._failures = 0
        self._retry_at = 0.0

    async def follow(self) -> None:
        """Look at the alias again and again, and at once when the engine ends."""
        while True:
            if self._proxy.upstream is None:
                await asyncio.sleep(self._service.poll_seconds)
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._now.engine.process.wait(), self._service.poll_seconds)
            await self._look()

    async def aclose(self) -> None:
        """End every engine."""
        for task in self._retiring:
            task.cancel()
        if self._retiring:
            await asyncio.wait(self._retiring)
        await self._now.ending.aclose()

    async def _look(self) -> None:
        # As it is now: one that ends further down is seen to by the next look.
        now, ended = self._now, self._now.ended
        if ended and self._proxy.upstream is not None:
            self._proxy.upstream = None
            self._trouble(
                now.row,
                f"the engine of {_title(now.row)} ended and is started again (it ended {now.engine.ending}):"
                f" {now.engine.last_log_line}",
            )
        try:
            wanted = await _champion(self._service, self._tracking_uri)
        except DeployError as error:
            self._trouble(now.row, f"whether the champion is still version {now.row.version} is not known: {error}")
            if not ended:
                return
            wanted = now.row
        if wanted.version == now.row.version and not ended:
            self._last_trouble = ""
            return
        if wanted.version == self._failed and time.monotonic() < self._retry_at:
            return
        try:
            self._now = await _start(self._service, self._tracking_uri, wanted)
        except (DeployError, OSError) as error:
            self._postpone(wanted)
            goes_on = "nothing answers" if ended else f"version {now.row.version} goes on answering"
            self._trouble(wanted, f"{_title(wanted)} cannot be served, {goes_on}: {error}")
            return
        self._failed, self._last_trouble = None, ""
        self._proxy.upstream = self._now.upstream
        then = f"; version {now.row.version} ends after the requests it has: {now.upstream.requests}"
        self._on_notice(Notice("answers", wanted.version, f"{_title(wanted)} answers now{'' if ended else then}"))
        task = asyncio.create_task(_retire(now))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _postpone(self, row: RegisteredModelVersion) -> None:
        self._failures = self._failures + 1 if row.version == self._failed else 0
        self._failed = row.version
        pause = min(self._service.poll_seconds * 2**self._failures, _LATEST_RETRY_SECONDS)
        self._retry_at = time.monotonic() + pause

    def _trouble(self, row: RegisteredModelVersion, text: str) -> None:
        line = " ".join(text.split())
        if line != self._last_trouble:
            self._last_trouble = line
            self._on_notice(Notice("trouble", row.version, line))


async def _judge(settle: Settle, on_notice: Callable[[Notice], None], *, pause: float) -> None:
    """Judge again and again, beside the engines: reading a model's weights takes a while."""
    last = ""
    while True:
        await asyncio.sleep(pause)
        try:
            judged, trouble = await asyncio.to_thread(settle), ""
        except DeployError as error:
            judged, trouble = (), f"what was set in MLflow is not judged: {' '.join(str(error).split())}"
        for notice in judged:
            on_notice(notice)
        if trouble and trouble != last:
            on_notice(Notice("trouble", 0, trouble))
        last = trouble


async def _champion(service: Service, tracking_uri: Callable[[], str]) -> RegisteredModelVersion:
    champion = await asyncio.to_thread(lambda: registry.champion(service.name, tracking_uri=tracking_uri()))
    if champion is None:
        name = service.name
        unknown = await asyncio.to_thread(lambda: registry.unknown_name(name, tracking_uri=tracking_uri()))
        way = unknown or f"Promote a prediction: relex promote {name}."
        raise NoSuchVersionError(f"{name} has no champion to serve. {way[0].upper()}{way[1:]}")
    return champion


async def _start(service: Service, tracking_uri: Callable[[], str], row: RegisteredModelVersion) -> _Running:
    directory = await asyncio.to_thread(
        lambda: registry.verified(row, tracking_uri=tracking_uri(), downloads=service.home / "models")
    )
    port = free_port()
    program = engine.command(
        directory.resolve(),
        name=service.name,
        port=port,
        given=service.engine,
        options=service.options,
        scratch=service.home / "serving" / row.digest,
    )
    log = service.home / "logs" / f"serve-{service.name}-{row.version}.log"
    ending = AsyncExitStack()
    started = await ending.enter_async_context(engine.running(program, port=port, log=log))
    served = Served(row.name, row.version, row.digest, row.target_step, row.created_ms)
    chats = engine.chats(directory, given=service.engine, options=service.options)
    return _Running(row, started, Upstream(started.url, served, chats=chats), ending)


async def _retire(replaced: _Running) -> None:
    try:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(replaced.upstream.idle(), _RETIRE_SECONDS)
    finally:
        await replaced.ending.aclose()


async def _first(tasks: "list[asyncio.Task[None]]") -> None:
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()


def _bound(service: Service) -> socket.socket:
    # Nobody connects before the first engine answers: the address is taken now, and listened at then.
    family = socket.AF_INET6 if ":" in service.host else socket.AF_INET
    # The protocol is named, or asyncio leaves Nagle's algorithm on and an answer of two writes waits 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((service.host, service.port))
    except OSError as error:
        listener.close()
        raise ServingError(
            f"{service.host}:{service.port} cannot be served at: {error.strerror}. Choose another --host or --port."
        ) from error
    return listener


def server_of(proxy: Proxy) -> uvicorn.Server:
    """Return the HTTP server that the proxy answers behind."""
    return uvicorn.Server(
        uvicorn.Config(
            proxy,
            # Its parser keeps a target as it came, and bounds the head.
            http=HeadTimed,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=_END_SECONDS,
        )
    )


def _title(row: RegisteredModelVersion) -> str:
    return f"{row.title} (step {row.target_step})"
