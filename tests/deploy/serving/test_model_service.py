"""Serving: a real registry, the real proxy and guard, and an engine of the user's own that costs nothing to start."""

import asyncio
import contextlib
import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
import pytest

from deploy import champions, registry
from deploy.champions import Clearance
from deploy.errors import CandidateError, NoSuchVersionError, ServingError
from deploy.registry import RegisteredModelVersion
from deploy.serving import engine, proxy
from deploy.serving.naming import NamedEvents
from deploy.serving.service import Notice, Service, server_of, serving
from deploy.tracking import connect, prepare
from tests.helpers.predictions import write_prediction
from tests.helpers.processes import children_of, command_of

ANSWERING = (
    f"{sys.executable} {shlex.quote(str(Path(__file__).with_name('answering_engine.py')))} {{model}} {{host}} {{port}}"
)
ADDRESS = ("serve", "digits", "--host", "127.0.0.1", "--port", "8123")
CHAT = "/v1/chat/completions"


@dataclass
class Home:
    """A home with a registry, the address somebody serves at, and what was said of it."""

    path: Path
    notices: list[Notice] = field(default_factory=list)
    url: str = ""
    # Candidates that no gate lets pass.
    refused: tuple[int, ...] = ()

    @property
    def uri(self) -> str:
        return prepare(self.path / "mlflow").tracking_uri

    def register(self, number: int) -> registry.Registered:
        model = write_prediction(self.path / f"predicted-{number}", number=number)
        return registry.register(model, name="digits", tracking_uri=self.uri)

    def promote(self, number: int) -> Path:
        """Register and promote the model with weights `number`; return the directory that is served."""
        made = self.register(number)
        self.move(made.version)
        return made.weights

    def set_alias(self, version: int) -> None:
        """Give a candidate the alias as MLflow's own page does, which verifies nothing."""
        connect(self.uri).set_registered_model_alias("digits-candidates", registry.CHAMPION, str(version))

    def judged(self) -> int:
        return max((one.version for one in self.notices if one.kind == "judged"), default=0)

    def move(self, version: int) -> None:
        champions.promote("digits", version, tracking_uri=self.uri, by="ada", judge=self.judge, downloads=self.path)

    def judge(self, candidate: RegisteredModelVersion, champion: RegisteredModelVersion | None) -> Clearance:
        passed = candidate.version not in self.refused
        return Clearance(passed=passed, reason="It is better." if passed else "It is worse.", metrics={})

    def settle(self) -> list[Notice]:
        settled = champions.settle("digits", tracking_uri=self.uri, judge=self.judge, downloads=self.path)
        return [Notice("judged", entry.candidate or 0, f"{entry.verdict}: {entry.reason}") for entry in settled]

    @asynccontextmanager
    async def serve(self, *, command: str = ANSWERING, poll_seconds: float = 0.1) -> AsyncIterator[httpx.AsyncClient]:
        service = Service("digits", self.path, command, port=0, poll_seconds=poll_seconds)
        on_notice = self.notices.append
        async with serving(service, tracking_uri=lambda: self.uri, on_notice=on_notice, settle=self.settle):
            self.url = self.notices[-1].text.rpartition(" ")[2].removesuffix("/v1")
            async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=120) as client:
                yield client

    def log(self, version: int) -> Path:
        return self.path / "logs" / f"serve-digits-{version}.log"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that was set up once: setting one up takes a second, copying it nothing."""
    return prepare(tmp_path_factory.mktemp("template")).database


@pytest.fixture
def home(template: Path, tmp_path: Path) -> Home:
    (tmp_path / "mlflow").mkdir()
    shutil.copy(template, tmp_path / "mlflow")
    return Home(tmp_path)


@asynccontextmanager
async def alone(names: Iterable[str] = (), *, chats: bool = True) -> AsyncIterator[Home]:
    """Serve a model behind which there is no engine, and say where."""
    front = proxy.Proxy(names=names)
    front.upstream = proxy.Upstream("http://127.0.0.1:1", proxy.Served("digits", 1, "d", 240, 0), chats=chats)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = server_of(front)
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        try:
            yield Home(Path(), url=f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            await task
            await front.aclose()


def mine(place: Path) -> set[psutil.Process]:
    """Return the live guards, engines and workers of engines that were started for a home."""
    named = {process for process in psutil.process_iter() if str(place) in " ".join(command_of(process))}
    return named | {child for process in named for child in children_of(process)}


async def until(condition: Callable[[], bool], *, seconds: float = 480) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def weights(client: httpx.AsyncClient, query: str = "") -> str:
    answer = await client.post(f"{CHAT}{query}", content=b"{}")
    assert answer.status_code == 200, answer.text
    return str(answer.json()["weights"])


def test_requests_and_answers_pass_unchanged(home: Home) -> None:
    home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            answer = await client.post(
                f"{CHAT}?a=%2F&status=418", content=b"what is 2+2", headers={"authorization": "Bearer me"}
            )
            request = answer.json()
            assert (answer.status_code, request["body"]) == (418, "what is 2+2")
            assert request["path"] == f"{CHAT}?a=%2F&status=418"
            assert request["headers"]["authorization"] == "Bearer me"
            assert answer.headers["x-engine"] == "weights 1"
            assert answer.headers["relex-version"] == "1"
            (model,) = (await client.get("/v1/models")).json()["data"]
            assert (model["id"], model["version"], model["target_step"]) == ("digits", 1, 240)
            assert (await client.post("/load_model", json={"model": "/another"})).status_code == 404

    asyncio.run(scenario())


def test_an_answer_has_the_name_that_was_asked_for(home: Home) -> None:
    home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            answer = await client.post(f"{CHAT}?named=json", content=b"{}")
            assert answer.json() == {"model": "digits", "text": "é"}
            assert answer.headers["content-length"] == str(len(answer.content))
            events = await client.post(f"{CHAT}?named=events", content=b"{}")
            first, done = events.text.split("\r\n\r\n")[:2]
            assert json.loads(first.removeprefix("data: ")) == {"model": "digits", "text": "é"}
            assert done == "data: [DONE]"

    asyncio.run(scenario())


def test_events_are_passed_on_line_by_line_however_they_arrive() -> None:
    whole = b'event: x\ndata: {"response": {"model": "a@main"}}\n\ndata: {"model": "b"}\n: ping\n\ndata: {"model"'
    for size in (1, 7, len(whole)):
        events = NamedEvents("b")
        passed = b"".join(events.feed(whole[start : start + size]) for start in range(0, len(whole), size))
        assert passed + events.end() == whole.replace(b"a@main", b"b")


def test_a_chat_with_a_model_that_has_no_template_is_refused_in_words(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert not engine.chats(tmp_path, given=None, options=())
    assert engine.chats(tmp_path, given=None, options=("--chat-template", "mine.jinja"))
    assert engine.chats(tmp_path, given=ANSWERING, options=())

    async def scenario() -> None:
        async with alone(chats=False) as home, httpx.AsyncClient(base_url=home.url, trust_env=False) as client:
            answer = await client.post(CHAT, content=b"{}")
            assert answer.status_code == 400
            assert answer.json()["error"]["message"].startswith("digits version 1 has no chat template: ask /v1/compl")
            # Others are asked: here there is no engine to answer.
            assert (await client.post("/v1/completions", content=b"{}")).status_code == 502

    asyncio.run(scenario())
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert engine.chats(tmp_path, given=None, options=())


# Of what loads another model, drops this one, or takes the path of any: servers decode, merge and resolve some of them.
SPELLINGS = [
    spelling
    for control in ("load_model", "reset", "v1/audio/transcriptions", "v1/load_lora_adapter")
    for spelling in (
        *(f"/{control}", f"/./{control}", f"/x/../{control}", f"/v1/models/../../{control}", f"//{control}"),
        *(f"/%2e/{control}", f"/x%2f..%2f{control}", f"/x/%2e%2e/{control}", f"/%2f{control}", f"/{control}%2f"),
        *(f"/{control}/", f"/{control}//", f"/{control}?x=/v1/models", f"/{control};x", f"/{control}%00"),
        *(f"/%6c{control[1:]}", f"http://127.0.0.1/{control}", f"/{control}#/v1/models", f"/{control.upper()}"),
        *(f"/v1/chat/completions/../../../{control}", f"/health/..%5c{control}", f"/.{control}", f"{control}"),
    )
]
ODD = [
    *("*", "//", "/", "/v1//chat/completions", f"{CHAT}/", "/v1/./chat/completions", "/v1/chat%2fcompletions"),
    *(f"{CHAT}?{'x' * 5000}", f"{CHAT}?{'x' * 70_000}"),
]


async def spoken(home: Home, request: str | bytes) -> str:
    """Return the status line of the answer to a request that is sent as it is written; empty without an answer."""
    reader, writer = await asyncio.open_connection(*home.url.removeprefix("http://").split(":"))
    writer.write(request.encode() if isinstance(request, str) else request)
    try:
        return (await reader.readline()).decode().strip()
    except ConnectionError:
        return ""
    finally:
        writer.close()


def statuses(answers: Iterable[str]) -> set[str]:
    return {answer.partition(" ")[2][:3] for answer in answers}


def test_an_engine_is_asked_by_the_plain_routes_of_the_interface_and_by_no_other_spelling(home: Home) -> None:
    home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            asked: dict[str, str] = {}
            for target in (*SPELLINGS, *ODD):
                for method in ("POST", "GET"):
                    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}"
                    asked[f"{method} {target}"] = await spoken(home, head)
            assert statuses(asked.values()) <= {"400", "404", "405"}, asked
            assert {target for target in ODD if "400" not in asked[f"POST {target}"]} == set()
            for route in ("chat/completions", "completions", "embeddings", "responses"):
                assert (await client.post(f"/v1/{route}", content=b"{}")).json()["path"] == f"/v1/{route}"
                assert (await client.get(f"/v1/{route}")).status_code == 405
            assert (await client.get("/health")).text == "here"
            assert (await client.post("/v1/models")).status_code == 405

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Host: localhost:1", "200"),
        ("Host: 127.0.0.1", "200"),
        ("Host: [::1]:8000", "200"),
        ("Host: Models.example:80", "200"),
        ("Host: localhost\r\nOrigin: http://localhost:3000", "200"),
        ("Host: localhost\r\nOrigin: https://models.example", "200"),
        ("Host: evil.example:8000", "403"),
        ("Host: 127.0.0.1.evil.example", "403"),
        ("Host: localhost@evil.example", "403"),
        ("Host: 10.0.0.1", "403"),
        ("Host: \x1b[2Jlocalhost", "403"),
        ("Host: ", "403"),
        ("X: y", "400"),
        ("Host: localhost\r\nHost: evil.example", "400"),
        ("Host: localhost\r\nOrigin: http://evil.example", "403"),
        ("Host: localhost\r\nOrigin: null", "403"),
        ("Host: localhost\r\nOrigin: file://localhost", "403"),
    ],
)
def test_a_stranger_s_name_or_page_is_refused(headers: str, status: str) -> None:
    async def scenario() -> str:
        async with alone(names=["models.example"]) as home:
            return await spoken(home, f"GET /v1/models HTTP/1.1\r\n{headers}\r\n\r\n")

    assert statuses([asyncio.run(scenario())]) == {status}


def test_before_http_1_1_a_host_is_wanted_too() -> None:
    async def scenario() -> str:
        async with alone() as home:
            return await spoken(home, "GET /v1/models HTTP/1.0\r\n\r\n")

    assert statuses([asyncio.run(scenario())]) == {"403"}


CHAT_HEAD = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (f"{CHAT_HEAD}Content-Length: 101\r\n\r\n", "413"),
        (f"{CHAT_HEAD}Content-Length: {'9' * 30}\r\n\r\n", "400"),
        (f"{CHAT_HEAD}Content-Length: {'9' * 19}\r\n\r\n", "413"),
        (f"{CHAT_HEAD}Transfer-Encoding: chunked\r\n\r\n" + f"32\r\n{'x' * 50}\r\n" * 3, "413"),
        (f"{CHAT_HEAD}Content-Length: -1\r\n\r\n", "400"),
    ],
)
def test_bodies_are_bounded(request_: str, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_BODY_BYTES", 100)

    async def scenario() -> str:
        async with alone() as home:
            return await spoken(home, request_)

    assert statuses([asyncio.run(scenario())]) == {status}


@pytest.mark.parametrize("begun", [f"{CHAT_HEAD}X: ", f"{CHAT_HEAD}X: y\r\n" * 2, "GET /v1/models?"])
def test_a_head_without_end_is_cut(begun: str) -> None:
    async def scenario() -> int:
        async with alone() as home:
            reader, writer = await asyncio.open_connection(*home.url.removeprefix("http://").split(":"))
            writer.write(begun.encode())
            sent = 0
            with contextlib.suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b"x" * 100_000)
                    await writer.drain()
                    sent += 100_000
                    await asyncio.sleep(0.001)
            writer.close()
            return sent

    # What the buffers of the connection swallow, too.
    assert asyncio.run(scenario()) < 10_000_000


@pytest.mark.parametrize(
    ("begun", "dripped", "status"),
    [
        ("", "", ""),
        ("POST /v1/ch", "", ""),
        (CHAT_HEAD, "X: y\r\n", ""),
        (f"{CHAT_HEAD}Content-Length: 90\r\n\r\n", "x", "408"),
        # After an answer the next head is timed, too, and the next body.
        ("GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\nGET /v1", "x", "200"),
    ],
)
def test_who_sends_a_request_slowly_is_left(
    begun: str, dripped: str, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "_HEAD_SECONDS", 0.3)
    monkeypatch.setattr(proxy, "_BODY_SECONDS", 0.3)

    async def scenario() -> bytes:
        loop = asyncio.get_running_loop()
        async with alone() as home:
            host, port = home.url.removeprefix("http://").split(":")
            # A stream would lose what has come when the connection is reset.
            with socket.create_connection((host, int(port))) as connection:
                connection.setblocking(False)
                await loop.sock_sendall(connection, begun.encode())
                answer = b""
                while True:
                    try:
                        async with asyncio.timeout(0.02):
                            chunk = await loop.sock_recv(connection, 1000)
                    except TimeoutError:
                        with contextlib.suppress(ConnectionError):
                            await loop.sock_sendall(connection, dripped.encode())
                    except ConnectionError:
                        return answer
                    else:
                        answer += chunk
                        if not chunk:
                            return answer

    answer = asyncio.run(asyncio.wait_for(scenario(), 60))
    assert statuses([answer.decode()]) == {status}


def test_a_request_that_takes_long_to_answer_is_not_slow(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "_HEAD_SECONDS", 0.2)
    monkeypatch.setattr(proxy, "_BODY_SECONDS", 0.2)
    served = home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            slow = asyncio.create_task(weights(client, "?wait=1"))
            await asyncio.sleep(0.8)
            assert not slow.done()
            (served.parent / "go").touch()
            assert await slow == "weights 1"

    asyncio.run(scenario())


def test_an_answer_is_streamed_and_dropped_when_the_client_leaves(home: Home) -> None:
    served = home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            async with client.stream("POST", f"{CHAT}?stream=6&wait=1", content=b"{}") as answer:
                chunks = answer.aiter_bytes()
                assert await anext(chunks) == b"0\n"
                (served.parent / "go").touch()
                assert b"".join([chunk async for chunk in chunks]) == b"1\n2\n3\n4\n5\n"
            async with client.stream("POST", f"{CHAT}?stream=1000", content=b"{}") as answer:
                await anext(answer.aiter_bytes())
            await until((served.parent / "gone").exists)

    asyncio.run(scenario())


def test_the_alias_moves_and_no_request_fails(home: Home) -> None:
    served = home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            seen: list[str] = []

            async def hammer() -> None:
                while seen.count("weights 2") < 20:
                    seen.append(await weights(client))

            hammering = [asyncio.create_task(hammer()) for _ in range(3)]
            slow = asyncio.create_task(weights(client, "?wait=1"))
            await until(lambda: len(seen) > 10)
            await asyncio.to_thread(home.promote, 2)
            await asyncio.gather(*hammering)
            assert seen[0] == "weights 1"
            assert sorted(set(seen)) == ["weights 1", "weights 2"]
            # The old engine answers what it had begun, and is gone after that.
            assert not slow.done()
            (served.parent / "go").touch()
            assert await slow == "weights 1"
            await until(lambda: len(mine(home.path)) == 3)
            assert await weights(client) == "weights 2"

    asyncio.run(scenario())
    assert [(one.kind, one.version) for one in home.notices] == [("answers", 1), ("answers", 2)]
    assert re.search("version 1 ends after the requests it has: [1-4]$", home.notices[1].text)
    assert mine(home.path) == set()


def test_a_damaged_version_changes_nothing_until_it_is_put_right(home: Home) -> None:
    home.promote(1)
    file = home.promote(2) / "model.safetensors"
    whole = file.read_bytes()
    home.move(1)

    def damaging(candidate: RegisteredModelVersion, champion: RegisteredModelVersion | None) -> Clearance:
        file.write_bytes(whole[:-1] + b"X")
        return home.judge(candidate, champion)

    async def scenario() -> None:
        async with home.serve() as client:
            # It was whole when it was promoted.
            await asyncio.to_thread(
                lambda: champions.promote(
                    "digits", 2, tracking_uri=home.uri, by="ada", judge=damaging, downloads=home.path
                )
            )
            await until(lambda: len(home.notices) == 2)
            assert await weights(client) == "weights 1"
            file.write_bytes(whole)
            await until(lambda: len(home.notices) == 3)
            assert await weights(client) == "weights 2"

    asyncio.run(scenario())
    _, refused, served = home.notices
    assert "cannot be served, version 1 goes on answering" in refused.text
    assert "SHA-256" in refused.text
    assert "\n" not in refused.text
    assert served.kind == "answers"


def test_an_alias_moved_by_hand_is_served_when_it_stands_and_never_when_it_does_not(home: Home) -> None:
    for number in (1, 2, 3):
        home.register(number)
    home.move(1)
    home.refused = (2,)

    async def scenario() -> None:
        async with home.serve() as client:
            for number in (2, 3):
                home.set_alias(number)
                await until(lambda number=number: home.judged() == number)  # type: ignore[misc]
                assert await weights(client) in ("weights 1", "weights 3")
            await until(lambda: home.notices[-1].kind == "answers")
            assert await weights(client) == "weights 3"

    asyncio.run(scenario())
    # What does not stand is never started.
    assert [(one.kind, one.version) for one in home.notices] == [
        *(("answers", 1), ("judged", 2), ("judged", 3), ("answers", 2))
    ]
    assert home.notices[1].text.startswith("refused: It is worse. To insist, say why:")


def test_what_was_set_by_hand_while_nothing_served_is_judged_first(home: Home) -> None:
    home.register(1)
    home.set_alias(1)

    async def scenario() -> None:
        async with home.serve() as client:
            assert await weights(client) == "weights 1"

    asyncio.run(scenario())
    assert [one.kind for one in home.notices] == ["judged", "answers"]


def test_an_engine_that_does_not_come_up_changes_nothing(home: Home) -> None:
    home.promote(1)

    async def scenario() -> None:
        async with home.serve() as client:
            await asyncio.to_thread(home.promote, 9)
            await until(lambda: len(home.notices) == 2)
            assert await weights(client) == "weights 1"
            # It is tried again, and nothing new is said about it.
            await until(lambda: home.log(2).read_text().count("no memory") > 2)
            assert len(home.notices) == 2

    asyncio.run(scenario())
    assert "the engine ended with status 1: no memory for weights 9" in home.notices[1].text


def test_an_engine_that_dies_is_started_again_from_whole_files(home: Home) -> None:
    file = home.promote(1) / "model.safetensors"
    whole = file.read_bytes()

    async def scenario() -> None:
        async with home.serve() as client:
            (died,) = (p for p in mine(home.path) if "deploy.serving.guard" not in command_of(p) and p.children() != [])
            left = died.children()
            file.write_bytes(whole.swapcase())
            died.kill()
            await until(lambda: len(home.notices) == 3)
            answer = await client.post(CHAT, content=b"{}")
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
            file.write_bytes(whole)
            await until(lambda: len(home.notices) == 4)
            assert await weights(client) == "weights 1"
            assert not any(process.is_running() for process in left)

    asyncio.run(scenario())
    _, ended, damaged, served = home.notices
    # Why, and no line about a request.
    why = (
        "the engine of digits version 1 (step 240) ended and is started again (it ended by SIGKILL): serving Its log is"
    )
    assert ended.text.startswith(why), ended.text
    assert "cannot be served, nothing answers" in damaged.text
    assert served.text == "digits version 1 (step 240) answers now"


def test_what_cannot_be_served_is_refused_before_anything_listens(home: Home) -> None:
    async def refused(command: str = ANSWERING, port: int = 0) -> None:
        service = Service("digits", home.path, command, port=port)
        on_notice = home.notices.append
        async with serving(service, tracking_uri=lambda: home.uri, on_notice=on_notice, settle=home.settle):
            pass

    with pytest.raises(NoSuchVersionError, match="digits has no champion to serve"):
        asyncio.run(refused())
    served = home.promote(1)
    with pytest.raises(ServingError, match=r"does not say where \{model\} goes"):
        asyncio.run(refused("my-server {port}"))
    with pytest.raises(ServingError, match=r"ended with status 2: .+nowhere.py"):
        asyncio.run(refused(f"{sys.executable} /nowhere.py {{model}} {{port}}"))
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ServingError, match="Choose another"):
        asyncio.run(refused(port=taken.getsockname()[1]))
    content = (served / "model.safetensors").read_bytes()
    (served / "model.safetensors").write_bytes(content.swapcase())
    with pytest.raises(CandidateError, match="SHA-256"):
        asyncio.run(refused())
    assert home.notices == []
    assert mine(home.path) == set()


@pytest.mark.slow
def test_asked_to_end_it_leaves_no_process(home: Home) -> None:
    home.promote(1)
    words = ["--home", str(home.path), "--port", "0", "--engine", ANSWERING, "--json"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "serve", "digits", *words], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        news = json.loads(process.stdout.readline())
        assert (news["kind"], news["version"]) == ("answers", 1)
        started = mine(home.path)
        # Itself, the guard, the engine and what the engine started.
        assert len(started) == 4
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 130
        assert not any(one.is_running() for one in started)
    finally:
        process.kill()
        process.communicate()


def test_vllm_is_taken_where_it_is_installed_and_transformers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(given: str | None = None, options: Sequence[str] = ()) -> engine.Command:
        return engine.command(
            tmp_path / "model", name="digits", port=8123, given=given, options=options, scratch=tmp_path / "scratch"
        )

    monkeypatch.setenv("PATH", str(tmp_path))
    default = command()
    assert default.argv[3:] == ("transformers.cli.transformers", *ADDRESS)
    assert (default.directory / "digits").readlink() == tmp_path / "model"
    (tmp_path / "vllm").write_text("#!/bin/sh\n")
    (tmp_path / "vllm").chmod(0o755)
    assert command(options=["--max-model-len", "512"]).argv == (
        *(str(tmp_path / "vllm"), "serve", str(tmp_path / "model"), "--served-model-name", "digits"),
        *("--host", "127.0.0.1", "--port", "8123", "--max-model-len", "512"),
    )
    own = command("""serve -m {model} --at {host}:{port} --as "{name}" --json '{"a": 1}'""")
    assert own.argv == (*f"serve -m {tmp_path / 'model'} --at 127.0.0.1:8123 --as digits --json".split(), '{"a": 1}')


def test_without_an_engine_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ServingError, match=r"Install vllm or 'relex-rlvr\[serve\]'"):
        engine.command(tmp_path, name="digits", port=1, given=None, options=(), scratch=tmp_path)
