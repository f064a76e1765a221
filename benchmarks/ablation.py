"""The paper's ablations (arXiv 2605.21468) on the demo's task: rank, raw, cubic, neural, and window by target.

Trains real GRPO runs into a cache (seeds x two batch sizes; a smaller batch is a noisier gradient), stores the first
also in bf16, predicts later steps from a few per cent of them with every method, and scores each prediction greedily on
the task's report problems. Writes ablation.json and ablation.md to --out.

    python benchmarks/ablation.py --cache ablation-runs --out ablation-results
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from flows.demo import task
from relex.extrapolation import extrapolate_run
from relex.predictors import parse_method

STEPS, SAVE_STEPS = 480, 2
WINDOWS, WINDOW = (12, 24, 48, 72), 48
TARGETS = (120, 240, 360, 480, 720)
METHODS = (
    "relex", "relex:rank=5", "relex:rank=10", "raw", "polynomial:degree=3", "neural", "weight-extrapolation",
    "secant", "travel", "saturating", "relex-pinned:damping=0.3", "hold",
)  # fmt: skip
PROBLEMS = 1000
MEMORY = 1 << 30
# Variant: problems a step, and the precision that base and checkpoints are stored in.
VARIANTS = {"fp32": (32, None), "bf16": (32, torch.bfloat16), "noisy": (8, None), "noisy bf16": (8, torch.bfloat16)}

Key = tuple[str, str, int, int]
"""Variant, method ("real" for the run itself), window and step."""


def train(cache: Path, seed: int, prompts: int) -> Path:
    """Return the directory of a finished run, with base/ and run/ in it, trained if it is not there."""
    root = cache / f"seed-{seed}-prompts-{prompts}"
    if not (root / "run" / f"checkpoint-{STEPS}" / "trainer_state.json").is_file():
        shutil.rmtree(root, ignore_errors=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        for module, arguments in (
            ("pretrain", ["--out", root / "base", "--seed", seed]),
            ("trainer", ["--base", root / "base", "--out", root / "run", "--steps", STEPS, "--save-steps", SAVE_STEPS,
                         "--seed", seed, "--prompts", prompts]),
        ):  # fmt: skip
            command = [sys.executable, "-m", f"flows.demo.{module}", *map(str, arguments)]
            subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    return root


def stored_as(root: Path, dtype: torch.dtype | None) -> Path:
    """Return the run as it is, or a copy of it that is stored in `dtype`."""
    if dtype is None:
        return root
    copy = root.with_name(f"{root.name}-{str(dtype).removeprefix('torch.')}")
    if not copy.exists():
        unfinished = copy.with_name(f"{copy.name}.tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(root, unfinished)
        for file in unfinished.rglob("model.safetensors"):
            times = file.stat()
            save_file(
                {name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"}
            )
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
        unfinished.rename(copy)
    return copy


def accuracy(model_directory: Path, tokenizer_directory: Path) -> float:
    """Return the share of the report problems that the model answers, greedily, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    problems = task.problems("report", PROBLEMS)
    right = 0.0
    for start in range(0, PROBLEMS, 250):
        batch = problems[start : start + 250]
        prompts = tokenizer([row["prompt"] for row in batch], return_tensors="pt")
        with torch.inference_mode():
            answers: Any = model.generate(**prompts, max_new_tokens=task.DIGITS + 1, do_sample=False)  # type: ignore[misc]
        texts = tokenizer.batch_decode(answers[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(task.reward(text, row["answer"]) for text, row in zip(texts, batch, strict=True))
    return right / PROBLEMS


def predictions(root: Path) -> Iterator[tuple[str, int, int, float]]:
    """Yield method, window, target step and accuracy: every method at one window, the first also at the others."""
    wanted = [(WINDOW, METHODS), *((window, METHODS[:1]) for window in WINDOWS if window != WINDOW)]
    for window, methods in wanted:
        for method in methods:
            with tempfile.TemporaryDirectory() as out:
                made = extrapolate_run(
                    root / "run",
                    root / "base",
                    targets=TARGETS,
                    out=Path(out),
                    window=window,
                    method=parse_method(method),
                    memory=MEMORY,
                    threads=1,
                    grams=root / "grams",
                    staging=Path(out),
                )
                for directory, manifest in made.items():
                    yield method, window, manifest.forecast.target_step, accuracy(Path(directory), root / "base")


def measure(cache: Path, seed: int, variant: str) -> dict[Key, float]:
    """Return the accuracy of every prediction of one run, and of the run itself."""
    prompts, dtype = VARIANTS[variant]
    root = stored_as(cache / f"seed-{seed}-prompts-{prompts}", dtype)
    accuracies = {
        (variant, "real", 0, step): accuracy(root / "run" / f"checkpoint-{step}", root / "base")
        for step in (*WINDOWS, *TARGETS)
        if step <= STEPS
    }
    accuracies[variant, "real", 0, 0] = accuracy(root / "base", root / "base")
    for method, window, target, value in predictions(root):
        accuracies[variant, method, window, target] = value
    return accuracies


def table(results: dict[Key, list[float]], variant: str) -> list[str]:
    """Return the Markdown table of one variant: mean over the seeds, and the standard deviation where it is large."""
    lines = [f"| {variant} | " + " | ".join(map(str, TARGETS)) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    rows = [("real run", [("real", 0, target) for target in TARGETS])]
    rows += [(f"`{method}`", [(method, WINDOW, target) for target in TARGETS]) for method in METHODS]
    rows += [
        (f"`relex`, window {window}", [("relex", window, target) for target in TARGETS])
        for window in WINDOWS
        if window != WINDOW
    ]
    for name, keys in rows:
        cells = [_cell(results.get((variant, *key), [])) for key in keys]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    spread = f" ± {stdev(values):.2f}"[0:7] if len(values) > 1 and stdev(values) >= 0.03 else ""
    return f"{fmean(values):.2f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=Path, required=True, help="directory for the training runs, reused")
    parser.add_argument("--out", type=Path, required=True, help="directory for ablation.json and ablation.md")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    runs = [
        (seed, prompts) for prompts in sorted({prompts for prompts, _ in VARIANTS.values()}) for seed in chosen.seeds
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(lambda run: train(chosen.cache, *run), runs))
    print(f"{len(runs)} runs after {time.monotonic() - began:.0f} s", flush=True)
    results: dict[Key, list[float]] = defaultdict(list)
    for variant in VARIANTS:
        for seed in chosen.seeds:
            for key, value in measure(chosen.cache, seed, variant).items():
                results[key].append(value)
            print(f"{variant}, seed {seed}, after {time.monotonic() - began:.0f} s", flush=True)
    chosen.out.mkdir(parents=True, exist_ok=True)
    rows = [{"variant": v, "method": m, "window": w, "step": s, "accuracy": a} for (v, m, w, s), a in results.items()]
    (chosen.out / "ablation.json").write_text(json.dumps(rows, indent=1) + "\n")
    text = "\n\n".join("\n".join(table(results, variant)) for variant in VARIANTS) + "\n"
    (chosen.out / "ablation.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
