"""relex beside what others released, on the same bytes: the authors' two scripts, and mergekit's task_arithmetic.

Builds a Qwen2 with some layers of `benchmarks.scale`, by default 2 with 41 M parameters, bf16, 20 checkpoints, and
runs each program as it is called by hand, imports included: RELEX at rank 1 by relex and by precompute_deltas.py and
svd_extrapolation.py of arXiv 2605.21468, whose axis is the number of the row, so they see the same steps as 1 to K;
then the sum alone, with one coefficient a checkpoint, by relex with its Gram kept, and by mergekit. Prints seconds,
peak resident memory, the disk that is needed beside the output, and how the outputs agree: cosine and ratio of the
norms of what they add to the base, and the share of bf16 weights that differ.

    python -m benchmarks.peers --relex-code DIR [--mergekit ENVIRONMENT] [--layers 2] [--checkpoints 20] [--keep DIR]
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors import safe_open
from transformers import Qwen2Config

from benchmarks.scale import HEADS, HIDDEN, INNER, build, shapes
from flows.demo.model import build_tokenizer
from relex.output import manifest

Command = list[str | Path]

MIB = 1 << 20
SCRIPTS = ("precompute_deltas.py", "svd_extrapolation.py")
# A process of its own, since a child's peak memory is at first that of the process that starts it.
MEASURE = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdout=sys.stderr)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
figures = time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024
print(json.dumps([done.returncode, *figures]))
"""


@dataclass(frozen=True)
class Figures:
    """What one program took: seconds, and MiB at most in memory."""

    wall: float
    cpu: float
    peak: float


@dataclass(frozen=True)
class Trajectory:
    """What every program reads, and the step they predict: twice the last one."""

    root: Path
    checkpoints: int
    threads: int

    @property
    def base(self) -> Path:
        return self.root / "base"

    @property
    def steps(self) -> dict[int, Path]:
        """Each checkpoint by the number of its row, from 1."""
        return {number: self.root / "run" / f"step_{10 * number}" for number in range(1, self.checkpoints + 1)}

    @property
    def target(self) -> int:
        return 2 * self.checkpoints


def run(command: Command, threads: int) -> Figures:
    """Run a program to its end; one that fails ends this one, with what it said last."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-c", MEASURE, *map(str, command)]
    done = subprocess.run(launcher, capture_output=True, text=True, env=environment, check=True)
    status, *figures = json.loads(done.stdout)
    if status:
        said = done.stderr.strip().splitlines() or ["nothing was said"]
        sys.exit(f"{' '.join(launcher[3:])} ended with status {status}: {said[-1]}")
    return Figures(*figures)


def disk(*directories: Path) -> float:
    """Return how many MiB the files below these directories take."""
    files = (path for directory in directories for path in directory.rglob("*") if path.is_file())
    return sum(path.stat().st_size for path in files) / MIB


def agreement(base: Path, model: Path, other: Path) -> tuple[float, float, float]:
    """Return cosine and ratio of norms of what two models add to the base, and the share of weights that differ."""
    product = square = other_square = 0.0
    differing = count = 0
    with (
        safe_open(base / "model.safetensors", "pt") as bases,
        safe_open(next(model.glob("*.safetensors")), "pt") as ours,
        safe_open(next(other.glob("*.safetensors")), "pt") as theirs,
    ):
        for name in bases.keys():  # noqa: SIM118 - no mapping, it has keys alone
            start, one, two = (file.get_tensor(name) for file in (bases, ours, theirs))
            differing += int((one != two).sum())
            count += start.numel()
            delta, other_delta = (one.double() - start.double()).view(-1), (two.double() - start.double()).view(-1)
            product += float(delta @ other_delta)
            square += float(delta @ delta)
            other_square += float(other_delta @ other_delta)
    return product / (square * other_square) ** 0.5, (other_square / square) ** 0.5, differing / count


def line(name: str, figures: Figures, temporary: float, agreed: tuple[float, float, float] | None = None) -> None:
    """Print one row of the table."""
    said = "" if agreed is None else f"{agreed[0]:12.6f}{agreed[1]:12.6f}{agreed[2]:11.2e}"
    numbers = f"{figures.wall:8.1f}{figures.cpu:8.1f}{figures.peak:10.0f}{temporary:10.0f}"
    print(f"{name:34}{numbers}{said}", flush=True)


def relex(read: Trajectory, method: str, out: Path, grams: Path) -> tuple[Figures, Path]:
    """Predict by relex; return what it took and the model."""
    step = 10 * read.target
    command: Command = [Path(sys.executable).with_name("relex"), "extrapolate", read.root / "run", "--base", read.base]
    command += ["--target-step", str(step), "--out", out, "--method", method, "--cache", grams]
    return run([*command, "--threads", str(read.threads)], read.threads), out / f"step-{step}"


def authors(read: Trajectory, scripts: Path, scratch: Path, ours: Path) -> None:
    """Print what the two scripts take, with their caches as their own example has them."""
    renamed, deltas, directions = scratch / "renamed", scratch / "deltas", scratch / "directions"
    renamed.mkdir()
    for number, directory in read.steps.items():
        (renamed / f"global_step_{number}").symlink_to(directory)
    common: Command = ["--base_model", read.base, "--num_workers", str(read.threads)]
    first: Command = [sys.executable, scripts / SCRIPTS[0], *common]
    first += ["--checkpoint_dir", renamed, "--output_dir", deltas]
    line(SCRIPTS[0], run(first, read.threads), disk(deltas))
    second: Command = [sys.executable, scripts / SCRIPTS[1], *common]
    second += ["--delta_dir", deltas, "--output_dir", scratch / "theirs", "--svd_cache_dir", directions]
    second += ["--history_steps", str(read.checkpoints), "--rank", "1", "--fit_method", "linear"]
    second += ["--mode", "extrapolate", "--target_steps", str(read.target)]
    figures = run(second, read.threads)
    theirs = scratch / "theirs" / f"step{read.target}"
    line(SCRIPTS[1], figures, disk(deltas, directions), agreement(read.base, ours, theirs))


def mergekit(read: Trajectory, program: str, scratch: Path, ours: Path) -> None:
    """Print what task_arithmetic takes with the coefficients of `ours`, which are those of every tensor."""
    made = manifest.read(ours).forecast.tensors.values()
    (coefficients,) = {tensor.coefficients for tensor in made}
    models = [
        {"model": str(directory), "parameters": {"weight": coefficient}}
        for directory, coefficient in zip(read.steps.values(), coefficients, strict=True)
    ]
    asked = {"merge_method": "task_arithmetic", "base_model": str(read.base), "models": models}
    config, merged = scratch / "merge.yaml", scratch / "merged"
    config.write_text(yaml.safe_dump(asked | {"dtype": "float32", "out_dtype": "bfloat16"}))
    command: Command = [program, config, merged, "--no-copy-tokenizer", "--quiet", "--num-threads", str(read.threads)]
    figures = run(command, read.threads)
    line("mergekit task_arithmetic", figures, 0, agreement(read.base, ours, merged))


def made(root: Path, layers: int, checkpoints: int) -> None:
    """Write the trajectory, each model with the config and the base with the tokenizer that others want."""
    build(root, layers, checkpoints)
    config = Qwen2Config(
        vocab_size=shapes(layers)["model.embed_tokens.weight"][0],
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=HIDDEN // (HEADS // 2),
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
        dtype=torch.bfloat16,
    )
    for directory in (root / "base", *(root / "run").iterdir()):
        config.save_pretrained(directory)
    build_tokenizer().save_pretrained(root / "base")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--relex-code", type=Path, metavar="DIR", help=f"has {' and '.join(SCRIPTS)}")
    parser.add_argument("--mergekit", type=Path, metavar="ENVIRONMENT", help="has bin/mergekit-yaml; default: the PATH")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep", type=Path, help="build here and keep it, or use what an earlier call built")
    options = parser.parse_args()
    scripts: Path | None = options.relex_code and options.relex_code.resolve()
    if scripts is not None and not all((scripts / name).is_file() for name in SCRIPTS):
        parser.error(f"{scripts} has not both {' and '.join(SCRIPTS)}: give the directory of the two scripts.")
    program = shutil.which("mergekit-yaml", path=options.mergekit and str(options.mergekit / "bin"))
    if options.mergekit and program is None:
        parser.error(
            f"{options.mergekit} has no bin/mergekit-yaml: give the environment that mergekit is installed in."
        )
    print(
        f"{'':34}{'wall s':>8}{'CPU s':>8}{'peak MiB':>10}{'disk MiB':>10}{'cosine':>12}{'norm':>12}{'differing':>11}"
    )
    with tempfile.TemporaryDirectory() as given:
        scratch = Path(given)
        root = (options.keep or scratch).resolve() / f"{options.layers}-layers-{options.checkpoints}"
        if not (root / "base").exists():
            made(root, options.layers, options.checkpoints)
        read = Trajectory(root, options.checkpoints, options.threads)
        grams = scratch / "grams"
        figures, ours = relex(read, "relex", scratch / "ours", grams)
        line("relex", figures, disk(grams))
        if scripts is None:
            print(f"the authors' scripts are left out: --relex-code DIR says where {' and '.join(SCRIPTS)} are")
        else:
            authors(read, scripts, scratch, ours)
        figures, ours = relex(read, "raw", scratch / "ours-raw", grams)
        line("relex, the sum alone", figures, disk(grams))
        if program is None:
            print("mergekit is left out: mergekit-yaml is not on PATH, and --mergekit ENVIRONMENT says where it is")
        else:
            mergekit(read, program, scratch, ours)


if __name__ == "__main__":
    main()
