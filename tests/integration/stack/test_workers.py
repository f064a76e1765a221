"""Real Dask: a scheduler and three workers, started as on four machines, write what the threads of one process do."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from dask.distributed import Client
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.settings import temporary_settings

from deploy.local.stack import Stack
from flows.decide.workers import sharing, spreading
from flows.settings import Settings, load_settings
from relex import ranges
from relex.errors import NonFiniteError
from relex.extrapolation import Request, extrapolate
from relex.gram import cached, measure
from relex.output.shards import Spread
from relex.predictors import parse_method
from relex.trajectory import open_run
from tests.helpers import ROOT
from tests.helpers.processes import command_of
from tests.helpers.stacks import prefect_settings
from tests.helpers.trajectories import drift, write_run

STEPS = (10, 20, 25, 40, 75)
TARGETS = (100, 200, 300)
TENSORS = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, server_environment: Mapping[str, str]) -> Iterator[str]:
    """Yield the address of a scheduler with three workers, of which two tests kill one each."""
    root = tmp_path_factory.mktemp("dask")
    file = root / "scheduler.json"
    common = ["--scheduler-file", str(file), "--no-dashboard"]
    # Without the process that would start a killed one again: the others are to take over.
    worker = ["worker", *common, "--nthreads", "1", "--memory-limit", "0", "--no-nanny"]
    environment = {**server_environment, "PYTHONPATH": str(ROOT)}
    with contextlib.ExitStack() as stack:
        for command in (["scheduler", "--host", "127.0.0.1", "--port", "0", *common], worker, worker, worker):
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("dask")), *command],
                env=environment,
                cwd=root,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            deadline = time.monotonic() + 240
            # It is there before its content is.
            while not (file.exists() and file.read_text().strip().endswith("}")) and time.monotonic() < deadline:
                time.sleep(0.05)
        yield str(yaml.safe_load(file.read_text())["address"])


@pytest.fixture(autouse=True)
def server(servers: Stack) -> Iterator[None]:
    with temporary_settings(prefect_settings(servers)):
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_run(root, drift({f"w{place}": (700, 1000) for place in range(TENSORS)}, steps=STEPS))
    return root


def settings_of(data: Path, **changes: object) -> Settings:
    content = {
        "training_run": "tiny",
        "checkpoints": "run",
        "base": "base",
        "window": 75,
        "targets": list(TARGETS),
        "selection": "selection.yaml",
        "gate": "gate.yaml",
        "registered_model": "tiny",
        "shard_size": "2MB",
        "task_runner": "dask",
        "memory": "64MiB",
        "threads": 1,
    }
    path = data / "relex.yaml"
    path.write_text(yaml.safe_dump(content | changes))
    return load_settings(path)


def write(settings: Settings, out: Path, spread: Spread | None, *, targets: tuple[int, ...] = TARGETS) -> None:
    trajectory = open_run(settings.checkpoints, settings.base)
    extrapolate(
        trajectory,
        [Request(parse_method("relex"), target, out / f"step-{target}") for target in targets],
        grams=settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
        shard_size=settings.shard_size,
        spread=spread,
    )


def digests(out: Path) -> dict[str, str]:
    """Every file below `out`, manifests too."""
    files = (file for file in out.rglob("*") if file.is_file())
    return {str(file.relative_to(out)): sha256(file.read_bytes()).hexdigest() for file in files}


def in_a_flow(
    settings: Settings, out: Path, *, targets: tuple[int, ...] = TARGETS
) -> tuple[State[None], list[TaskRun]]:
    """Return how a flow run that spreads the writing ended, and its task runs, all of them at an end."""

    @flow
    def spread() -> None:
        write(settings, out, spreading(settings), targets=targets)

    state = spread(return_state=True)
    assert state.state_details.flow_run_id is not None
    only = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(1200):
            runs = client.read_task_runs(flow_run_filter=only)
            # The server hears of them a moment later.
            if runs and all(run.state is not None and run.state.is_final() for run in runs):
                break
            time.sleep(0.1)
    return state, runs


@pytest.mark.slow
def test_workers_elsewhere_write_the_bytes_of_one_process_and_are_seen_in_the_flow_run(
    cluster: str, data: Path, tmp_path: Path
) -> None:
    settings = settings_of(data, dask_address=cluster)
    write(settings, tmp_path / "threads", None)
    state, runs = in_a_flow(settings, tmp_path / "dask")
    assert state.is_completed()
    assert digests(tmp_path / "dask") == digests(tmp_path / "threads")
    files = sorted(file.name for file in (tmp_path / "dask" / "step-100").glob("*.safetensors"))
    assert len(files) == TENSORS
    assert sorted(run.name for run in runs) == files


@pytest.mark.slow
def test_workers_elsewhere_take_the_gram_of_one_process(
    cluster: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 8 << 20)
    settings = settings_of(data, dask_address=cluster)
    trajectory = open_run(settings.checkpoints, settings.base)
    alone = measure(trajectory, memory=int(settings.memory), threads=1)
    made = measure(trajectory, memory=int(settings.memory), threads=1, share=sharing(settings))
    assert made.products.tolist() == alone.products.tolist()
    assert made.digest == alone.digest


def die_when_reading(name: str, armed: str) -> None:
    """Have this worker kill itself as it opens `name` to read a range, if no other one has: it takes `armed` along."""

    def look(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and str(arguments[0]).endswith(name):
            with contextlib.suppress(FileNotFoundError):
                Path(armed).rename(f"{armed}-{os.getpid()}")
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_reads_costs_its_range_alone(
    cluster: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", 8 << 20)
    settings = settings_of(data, dask_address=cluster)
    trajectory = open_run(settings.checkpoints, settings.base)
    before = digests(data)
    alone = cached(trajectory, tmp_path / "alone", memory=int(settings.memory), threads=1)
    armed = tmp_path / "armed"
    armed.touch()
    with Client(cluster) as client:  # type: ignore[no-untyped-call]
        workers = set(client.run(os.getpid).values())
        client.run(die_when_reading, "checkpoint-40/model.safetensors", str(armed))
        made = cached(trajectory, tmp_path / "dask", memory=int(settings.memory), threads=1, share=sharing(settings))
        left = set(client.run(os.getpid).values())
    (killed,) = workers - left
    assert [path.name for path in tmp_path.glob("armed*")] == [f"armed-{killed}"]
    assert made.products.tolist() == alone.products.tolist()
    # Beside the Gram that is kept there is nothing, and it is the same file.
    assert digests(tmp_path / "dask") == digests(tmp_path / "alone")
    assert digests(data) == before


@pytest.mark.slow
def test_a_refusal_on_a_worker_is_not_tried_again_and_takes_back_what_was_written(cluster: str, tmp_path: Path) -> None:
    write_run(tmp_path, drift(base=torch.float16, stored=torch.float16))
    settings = settings_of(tmp_path, dask_address=cluster, shard_size="100KB")
    state, runs = in_a_flow(settings, tmp_path / "out", targets=(10**11,))
    with pytest.raises(NonFiniteError, match="at step 100000000000 by relex leaves the range"):
        state.result()
    assert not (tmp_path / "out").exists()
    assert {run.run_count for run in runs} == {1}


@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_writes_costs_its_shard_alone(
    cluster: str, data: Path, tmp_path: Path
) -> None:
    settings = settings_of(data, dask_address=cluster)
    write(settings, tmp_path / "threads", None)
    out = tmp_path / "dask"
    begun: dict[str, set[int]] = {}
    killed: list[str] = []
    kept: dict[str, int] = {}
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            # A file gets another name, or its directory does, while it is looked at.
            with contextlib.suppress(FileNotFoundError):
                look_once()
            time.sleep(0.001)

    def look_once() -> None:
        whole = {path.name: path.stat().st_ino for path in out.glob(".step-300*.partial/*.safetensors")}
        for file in out.glob(".step-100*.partial/*.safetensors.*.tmp"):
            # model-00001-of-00008.safetensors.HOST-PID.tmp
            shard, pid = f"{file.name.split('.')[0]}.safetensors", int(file.stem.rsplit("-", 1)[1])
            begun.setdefault(shard, set()).add(pid)
            if whole and not killed:
                os.kill(pid, signal.SIGSTOP)
                if file.exists():
                    killed.append(shard)
                    kept.update(whole)
                os.kill(pid, signal.SIGKILL if killed else signal.SIGCONT)

    killer = threading.Thread(target=look, daemon=True)
    killer.start()
    try:
        write(settings, out, spreading(settings))
    finally:
        done.set()
        killer.join()
    assert digests(out) == digests(tmp_path / "threads")
    assert not [path for path in out.rglob("*") if "tmp" in path.name or "partial" in path.name]
    assert killed
    assert {name: (out / "step-300" / name).stat().st_ino for name in kept} == kept
    assert {shard for shard, pids in begun.items() if len(pids) > 1} <= set(killed)


@pytest.mark.slow
def test_without_an_address_workers_of_this_machine_are_started_and_ended(data: Path, tmp_path: Path) -> None:
    settings = settings_of(data, threads=2, shard_size="8MB")
    write(settings, tmp_path / "threads", None)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    write(settings, tmp_path / "dask", spreading(settings))
    assert digests(tmp_path / "dask") == digests(tmp_path / "threads")
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    # Python's own tracker of shared resources stays with the process that asked for it.
    commands = [" ".join(command) for child in left if (command := command_of(child))]
    assert not [command for command in commands if "resource_tracker" not in command]
