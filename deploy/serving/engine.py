"""An inference engine: the program that answers for one model directory, behind a guard that ends it with us.

vLLM where it is installed, `transformers serve` where not, or any command that serves HTTP from a plain directory.
"""

import asyncio
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from deploy.errors import ServingError
from deploy.local.daemon import last_log_line
from deploy.local.port import HOST, listens
from deploy.local.server import NO_TELEMETRY

# A large model is read from a network disk and compiled for; one that cannot be loaded ends by itself.
_START_SECONDS = 1800.0
_LOOK_SECONDS = 0.2

# How servers log a request: '"POST /v1/completions HTTP/1.1" 200'.
_ACCESS = re.compile(r'"[A-Z]+ \S+ HTTP/[0-9.]+"')
# What a model brings for chats.
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates", "tekken.json")


@dataclass(frozen=True)
class Command:
    """What to run, and in which directory."""

    argv: tuple[str, ...]
    directory: Path


@dataclass(frozen=True)
class Engine:
    """A running engine that answers at `url`; `process` is its guard, which ends with it."""

    url: str
    process: asyncio.subprocess.Process
    log: Path
    # Where its part of the log begins: one engine after another writes to it.
    start: int = 0

    @property
    def last_log_line(self) -> str:
        """The last line it wrote that is not about a request."""
        return f"{last_log_line(self.log, start=self.start, but=_ACCESS)} Its log is {self.log}."

    @property
    def ending(self) -> str:
        """How it ended, by the status that its guard hands on."""
        code = self.process.returncode or 0
        number = -code if code < 0 else code - 128
        return next((f"by {known.name}" for known in signal.Signals if known == number), f"with status {code}")


def command(model: Path, *, name: str, port: int, given: str | None, options: Sequence[str], scratch: Path) -> Command:
    """Return the command that serves the directory `model` as `name` on a loopback port, `options` at its end.

    `scratch` is a directory for this model alone, which may be made.
    In a `given` command {model}, {name}, {host} and {port} are filled in. ServingError where it leaves {model} or
    {port} out, or where nothing is given and no engine is installed.
    """
    if given is not None:
        if missing := [field for field in ("{model}", "{port}") if field not in given]:
            raise ServingError(
                f"--engine {given!r} does not say where {missing[0]} goes."
                " Write it like 'my-server {model} --host {host} --port {port}'."
            )
        filled = {"{model}": str(model), "{name}": name, "{host}": HOST, "{port}": str(port)}
        words = shlex.split(given)
        for field, value in filled.items():
            words = [word.replace(field, value) for word in words]
        return Command((*words, *options), Path.cwd())
    address = ("--host", HOST, "--port", str(port))
    if vllm := shutil.which("vllm"):
        return Command((vllm, "serve", str(model), "--served-model-name", name, *address, *options), model)
    if importlib.util.find_spec("openai") is None:
        raise ServingError(
            "no engine is installed: vllm is not on the path, and transformers serve lacks openai."
            " Install vllm or 'relex-rlvr[serve]', or name another with --engine."
        )
    # It is asked under the name it was started with and knows no other: a link gives the directory that name.
    scratch.mkdir(parents=True, exist_ok=True)
    link = scratch / name
    if not link.is_symlink() or link.readlink() != model:
        link.unlink(missing_ok=True)
        link.symlink_to(model)
    argv = (sys.executable, "-P", "-m", "transformers.cli.transformers", "serve", name, *address, *options)
    return Command(argv, scratch)


def chats(model: Path, *, given: str | None, options: Sequence[str]) -> bool:
    """Return whether an engine has a template for chats: the model's, one of its options, or maybe one of its own."""
    if given is not None or any(option.startswith("--chat-template") for option in options):
        return True
    config = model / "tokenizer_config.json"
    try:
        told = json.loads(config.read_bytes()) if config.is_file() else {}
    except ValueError:
        told = {}
    return any((model / name).exists() for name in _TEMPLATES) or bool(told.get("chat_template"))


@asynccontextmanager
async def running(program: Command, *, port: int, log: Path) -> AsyncIterator[Engine]:
    """Start an engine, yield it once it answers, and end it; ServingError where it ends before or never answers."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as written:
        start = written.tell()
        process = await asyncio.create_subprocess_exec(
            # -P: a package `flows` of the directory one happens to be in is not ours.
            *(sys.executable, "-P", "-m", "deploy.serving.guard", str(program.directory), *program.argv),
            stdin=asyncio.subprocess.PIPE,
            stdout=written,
            stderr=written,
            # The directory is here: nothing is asked of the Hub.
            env={**os.environ, **NO_TELEMETRY, "HF_HUB_OFFLINE": "1"},
            # An interrupt at the terminal reaches us, and we let running requests end first.
            start_new_session=True,
        )
    engine = Engine(f"http://{HOST}:{port}", process, log, start)
    try:
        try:
            async with asyncio.timeout(_START_SECONDS):
                await _until_it_answers(engine, port)
        except TimeoutError as error:
            raise ServingError(
                f"the engine does not answer after {_START_SECONDS:.0f} s: {engine.last_log_line}"
            ) from error
        yield engine
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await process.wait()


async def _until_it_answers(engine: Engine, port: int) -> None:
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while engine.process.returncode is None:
            try:
                answer = await client.get(f"{engine.url}/health")
            except httpx.TransportError:
                pass
            else:
                # An engine without this page answers, too. The port may have gone to a stranger in the meantime.
                if answer.status_code < 500 and _answers(engine.process.pid, port):
                    return
            await asyncio.sleep(_LOOK_SECONDS)
    raise ServingError(f"the engine ended {engine.ending}: {engine.last_log_line}")


def _answers(guard: int, port: int) -> bool:
    try:
        return listens(psutil.Process(guard).children(recursive=True), port=port)
    except psutil.NoSuchProcess:
        return False
