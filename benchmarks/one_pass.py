"""How far one extrapolation is from the floor: reading and converting the same bytes once.

Builds trajectories of a Qwen2-shaped model (40 M parameters with 20 checkpoints by default), then runs, turn by turn
and each in a process of its own: the floor, and the product's own path, which takes the Gram, fits, and writes the
predictions. Prints wall and CPU seconds without imports, as they are and as multiples of the floor's, peak resident
memory, and the bytes that went through read calls and that came from the disk: of each the run with the least CPU time.
The files come from the page cache, or with --cold from the disk, as a run's checkpoints that were written an hour ago
do. With --cache the page cache forgets what was read so many MiB ago, as that of a machine does whose memory the run
exceeds; --two-passes takes the Gram of everything first, as a method does that needs all Grams at once.

    .venv/bin/python benchmarks/one_pass.py [--parameters 40] [--checkpoints 12 20 75] [--dtype bfloat16 float32]
        [--targets 1] [--threads 1 2] [--cold] [--cache MIB] [--two-passes] [--keep DIR]
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from relex import extrapolation, gram, kernel, store, streaming, trajectory
from relex.predictors import parse_method

MIB = 1 << 20


def build(root: Path, millions: int, checkpoints: int, dtype: torch.dtype) -> None:
    """Write base/ and run/step_N: a drift of 1e-6 a step with noise of the same size."""
    hidden, layers = 512, max(1, round((millions * 1e6 - 16_000 * 512) / (4 * 512 * 512 + 3 * 512 * 1536)))
    shapes = {"model.embed_tokens.weight": (16_000, hidden), "model.norm.weight": (hidden,)}
    for layer in range(layers):
        for name in ("q", "k", "v", "o"):
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name in ("gate", "up"):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = (1536, hidden)
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, 1536)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (hidden,)
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drift = {name: 1e-6 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    for step in range(0, 10 * checkpoints + 1, 10):
        state = {
            name: (base[name] + step * drift[name] + 1e-5 * torch.randn(shapes[name], generator=generator)).to(dtype)
            for name in shapes
        }
        path = root / ("base" if step == 0 else f"run/step_{step}")
        path.mkdir(parents=True)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        (path / "config.json").write_text("{}")
        if step:
            (path / "trainer_state.json").write_text("{}")


def floor(root: Path, threads: int, dtype: torch.dtype) -> None:
    """Read every file once in pieces that fit a core's cache and convert them to fp32, as simply as can be."""
    torch.set_num_threads(1)

    def convert(path: Path) -> None:
        raw = torch.empty(MIB // 4, dtype=torch.uint8)
        out = torch.empty(MIB // 4 // dtype.itemsize, dtype=torch.float32)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(raw.numpy().data):
                whole = count // dtype.itemsize
                out[:whole].copy_(raw[: whole * dtype.itemsize].view(dtype))

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(convert, sorted(root.glob("**/model.safetensors"))))


def extrapolate(root: Path, memory: int, threads: int, targets: int, *, two_passes: bool) -> dict[str, float]:
    """Run the product's own path: trajectory, Gram, forecasts, outputs."""
    began, computed = time.perf_counter(), time.process_time()
    base = store.open_base(root / "base")
    run = root / "run"
    observed = store.observed(store.scan(run, base, now=time.time()), run)
    opened = trajectory.open_trajectory(base, observed)
    with tempfile.TemporaryDirectory(dir=root) as directory:
        scratch = Path(directory)
        if two_passes:
            gram.cached(opened, scratch / "grams", memory=memory, threads=threads)
        requests = [
            extrapolation.Request(parse_method("relex"), step, scratch / f"step-{step}")
            for step in range(500, 500 + 100 * targets, 100)
        ]
        extrapolation.extrapolate(opened, requests, grams=scratch / "grams", memory=memory, threads=threads)
        figures = {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - computed}
        useful = sum(path.stat().st_size for path in scratch.rglob("*") if path.is_file())
    return figures | {"kept_mib": useful / MIB}


def keep_little(most: int) -> None:
    """Have the page cache forget all but the `most` bytes that were read last."""
    reads: dict[tuple[int, int, int], None] = {}
    files: dict[int, int] = {}
    lock = threading.Lock()
    held = 0
    plain = kernel.read

    def read(pieces_4P: NDArray[np.int64], buffer: memoryview) -> bool:
        nonlocal held
        done = plain(pieces_4P, buffer)
        with lock:
            for descriptor, position, _, length in pieces_4P.T.tolist():
                file = os.fstat(descriptor).st_ino
                if file not in files:
                    files[file] = os.dup(descriptor)
                one = (files[file], position, length)
                held += length if one not in reads else 0
                reads.pop(one, None)
                reads[one] = None
            while held > most:
                oldest, position, length = next(iter(reads))
                del reads[oldest, position, length]
                # With what lies before it: the cache drops only whole stretches of what it fetched at once.
                begin = max(0, position - MIB)
                os.posix_fadvise(oldest, begin, position + length - begin, os.POSIX_FADV_DONTNEED)
                held -= length
        return done

    vars(streaming)["read"] = read


def forget(root: Path) -> None:
    """Drop the trajectory from the page cache."""
    os.sync()
    for path in root.glob("**/model.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measured(arguments: list[str]) -> dict[str, float]:
    """Run this script's own worker in a fresh process and return what it measured."""
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, capture_output=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def worker(options: argparse.Namespace) -> None:
    """Do one measured thing and print its figures as JSON."""
    before = io_counters()
    resident = peak_resident_mib()
    began, computed = time.perf_counter(), time.process_time()
    figures: dict[str, float] = {}
    (threads,) = options.threads
    if options.worker == "floor":
        floor(options.keep, threads, getattr(torch, options.dtype[0]))
    else:
        if options.cache:
            keep_little(options.cache * MIB)
        figures = extrapolate(
            options.keep, options.memory * MIB, threads, options.targets, two_passes=options.two_passes
        )
    figures.setdefault("cpu_s", time.process_time() - computed)
    figures.setdefault("wall_s", time.perf_counter() - began)
    after = io_counters()
    figures |= {key: (after[key] - before[key]) / MIB for key in before}
    figures |= {"imports_rss_mib": resident, "peak_rss_mib": peak_resident_mib()}
    print(json.dumps(figures))


def peak_resident_mib() -> float:
    """Peak resident memory of this process; ru_maxrss would include its parent's."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


def io_counters() -> dict[str, int]:
    """Bytes through read calls of this process, and from the disk for it, so far."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"read_mib": int(fields["rchar"]), "disk_mib": int(fields["read_bytes"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=int, default=40, help="millions")
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[20])
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"], choices=["bfloat16", "float32"])
    parser.add_argument("--targets", type=int, default=1)
    parser.add_argument("--threads", type=int, nargs="+", default=[os.cpu_count() or 1])
    parser.add_argument("--memory", type=int, default=512, help="MiB")
    parser.add_argument("--cold", action="store_true", help="read from the disk, not from the page cache")
    parser.add_argument("--cache", type=int, default=0, help="MiB that the page cache remembers (0: as it is)")
    parser.add_argument("--two-passes", action="store_true", help="take the Gram of everything first")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="build here and keep it, or use what an earlier call built")
    parser.add_argument("--worker", choices=["floor", "extrapolate"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    print(
        f"{'K':>3} {'dtype':9}{'threads':>8}{'floor: wall':>12}{'CPU s':>7}{'run: wall':>11}{'CPU s':>7}"
        f"{'x wall':>8}{'x CPU':>7}{'peak MiB':>10}{'read MiB':>10}{'disk MiB':>10}{'kept':>7}"
    )
    for checkpoints in options.checkpoints:
        for dtype in options.dtype:
            with tempfile.TemporaryDirectory() as scratch:
                root = options.keep / f"{checkpoints}-{dtype}" if options.keep else Path(scratch)
                if not (root / "base").exists():
                    build(root, options.parameters, checkpoints, getattr(torch, dtype))
                for threads in options.threads:
                    measure(root, checkpoints, dtype, threads, options)


def measure(root: Path, checkpoints: int, dtype: str, threads: int, options: argparse.Namespace) -> None:
    """Run floor and extrapolation in turns and print a line."""
    common = ["--keep", str(root), "--threads", str(threads), "--dtype", dtype]
    common += ["--targets", str(options.targets), "--memory", str(options.memory), "--cache", str(options.cache)]
    common += ["--two-passes"] if options.two_passes else []
    runs: dict[str, list[dict[str, float]]] = {"floor": [], "extrapolate": []}
    for _ in range(options.repeats):
        for kind, figures in runs.items():
            if options.cold:
                forget(root)
            figures.append(measured(["--worker", kind, *common]))
    bare, full = (min(figures, key=lambda one: one["cpu_s"]) for figures in runs.values())
    walls = [min(one["wall_s"] for one in figures) for figures in runs.values()]
    print(
        f"{checkpoints:3} {dtype:9}{threads:8}{walls[0]:12.2f}{bare['cpu_s']:7.2f}{walls[1]:11.2f}{full['cpu_s']:7.2f}"
        f"{walls[1] / walls[0]:8.2f}{full['cpu_s'] / bare['cpu_s']:7.2f}"
        f"{full['peak_rss_mib']:10.0f}{full['read_mib']:10.0f}{full['disk_mib']:10.0f}{full['kept_mib']:7.1f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
