"""Re-grounding against plain RL on the demo's run: steps and seconds to the same accuracy, over seeds.

For each seed: supervise the demo's base, train it plainly with GRPO, find the first of its checkpoints at the target
accuracy on the selection problems (by bisection: the curve rises), then alternate real steps and jumps from the same
base to the same accuracy. Both ends are scored on problems that neither saw. Everything lies in --out, and a call after
a kill goes on; reground.json and reground.md there are the result. Three seeds take about 15 minutes on a quiet core.

    .venv/bin/python benchmarks/reground.py --out /tmp/reground [--seeds 0 1 2] [--real-steps 24] [--jump-steps auto]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Before anything imports torch: the threads of a model this small only fight each other.
os.environ["OMP_NUM_THREADS"] = "1"

import yaml

from evaluation.answers.harness import evaluate
from evaluation.benchmarks.benchmark import write_benchmark
from flows.demo.task import DIGITS, problems
from flows.reground.loop import reground
from flows.reground.settings import load_reground_settings
from flows.state.records import write_json

SAVE_STEPS = 8
PROBLEMS = {"selection": 500, "report": 1000}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--real-steps", type=int, default=24)
    parser.add_argument(
        "--jump-steps", type=lambda text: text if text == "auto" else int(text), default="auto", help="auto: a ladder"
    )
    parser.add_argument("--method", default="secant")
    parser.add_argument("--target", type=float, default=0.95, help="accuracy on the selection problems")
    parser.add_argument("--plain-steps", type=int, default=400)
    options = parser.parse_args()
    out = options.out.absolute()
    for split, count in PROBLEMS.items():
        write_benchmark(out, split, problems(split, count), max_new_tokens=DIGITS + 1)  # type: ignore[arg-type]
    rows = [measure(out, seed, options) for seed in options.seeds]
    write_json(out / "reground.json", {"options": vars(options) | {"out": str(out)}, "seeds": rows})
    text = table(rows, options)
    (out / "reground.md").write_text(text, encoding="utf-8")
    print(text)


def measure(out: Path, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    directory = out / f"seed-{seed}"
    base = directory / "base"
    if not (base / "tokenizer_config.json").exists():
        shutil.rmtree(base, ignore_errors=True)
        demo("pretrain", "--out", str(base), "--seed", str(seed))
    name = f"{options.method}-{options.real_steps}-{options.jump_steps}"
    seconds = train_plainly(directory, seed, options.plain_steps)
    steps = sorted(seconds)
    reached = first(directory, steps, options.target)
    plain = {
        "steps": reached,
        "seconds": seconds[reached],
        "selection": accuracy(directory, checkpoint(directory, reached), "selection"),
        "report": accuracy(directory, checkpoint(directory, reached), "report"),
    }
    content = {
        "training_run": "".join(letter if letter.isalnum() else "-" for letter in name.lower()),
        "base": "base",
        # A data order of its own for each cycle of each seed.
        "command": [
            *(sys.executable, "-m", "flows.demo.trainer", "--base", "{base}", "--out", "{out}", "--steps", "{steps}"),
            *("--save-steps", str(SAVE_STEPS), "--seed", f"{seed + 1}00{{cycle}}"),
        ],
        "real_steps": options.real_steps,
        "jump_steps": options.jump_steps,
        "method": options.method,
        "selection": str(out / "selection.yaml"),
        "total_steps": 4 * options.plain_steps,
        "target_accuracy": options.target,
        "reference": {"steps": plain["steps"], "seconds": plain["seconds"]},
        "batch_size": 250,
        "memory": "256MiB",
        "threads": 1,
    }
    config = directory / f"{content['training_run']}.yaml"
    config.write_text(yaml.safe_dump(content), encoding="utf-8")
    done = reground(load_reground_settings(config), tell=silent)
    jumped = done.to_json() | {"report": accuracy(directory, Path(done.model), "report")}
    return {"seed": seed, "base": done.start.accuracy, "plain": plain, "reground": jumped}


def silent(what: str, done: int, total: int) -> None:
    pass


def train_plainly(directory: Path, seed: int, steps: int) -> dict[int, float]:
    """Train once and return, for each checkpoint, the seconds from the start of the trainer until it was there."""
    record, run = directory / "plain.json", directory / "plain"
    if not record.exists():
        shutil.rmtree(run, ignore_errors=True)
        began = time.time()
        arguments = ["--steps", str(steps), "--save-steps", str(SAVE_STEPS), "--seed", str(seed)]
        demo("trainer", "--base", str(directory / "base"), "--out", str(run), *arguments)
        markers = run.glob("checkpoint-*/trainer_state.json")
        write_json(record, {marker.parent.name.split("-")[1]: marker.stat().st_mtime - began for marker in markers})
    return {int(step): float(value) for step, value in json.loads(record.read_text()).items()}


def first(directory: Path, steps: Sequence[int], target: float) -> int:
    if accuracy(directory, checkpoint(directory, steps[-1]), "selection") < target:
        sys.exit(f"plain RL is below {target} after {steps[-1]} steps: raise --plain-steps, in another --out")
    low, high = -1, len(steps) - 1
    while high - low > 1:
        middle = (low + high) // 2
        enough = accuracy(directory, checkpoint(directory, steps[middle]), "selection") >= target
        low, high = (low, middle) if enough else (middle, high)
    return steps[high]


def checkpoint(directory: Path, step: int) -> Path:
    return directory / f"plain/checkpoint-{step}"


def accuracy(directory: Path, model: Path, split: str) -> float:
    benchmark = directory.parent / f"{split}.yaml"
    return evaluate(model, [benchmark], cache=directory / "evaluations", batch_size=250)[0].report.accuracy


def demo(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"flows.demo.{module}", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.stderr)


def table(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> str:
    lines = [
        f"Re-grounding, {options.real_steps} real steps and a jump of {options.jump_steps} by {options.method}, to"
        f" accuracy {options.target} on {PROBLEMS['selection']} selection problems; report: {PROBLEMS['report']} other"
        " problems.",
        "",
        "| seed | plain steps | re-grounded: trained + jumped | cycles | jumps refused | steps saved | plain s |"
        " training s | predicting and scoring s | plain report | re-grounded report |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        plain, jumped = row["plain"], row["reground"]
        cycles = jumped["cycles"]
        refused = sum(cycle["jumped_accuracy"] is not None and not cycle["jumped_steps"] for cycle in cycles)
        trained = f"{jumped['real_steps']} + {jumped['jumped_steps']}{'' if jumped['reached'] else ' (not reached)'}"
        lines.append(
            f"| {row['seed']} | {plain['steps']} | {trained} | {len(cycles)} | {refused}"
            f" | {plain['steps'] - jumped['real_steps']} | {plain['seconds']:.0f} | {jumped['training_seconds']:.0f}"
            f" | {jumped['other_seconds']:.0f} | {plain['report']:.3f} | {jumped['report']:.3f} |"
        )
    ratio = statistics.mean(row["plain"]["steps"] / row["reground"]["real_steps"] for row in rows)
    return "\n".join([*lines, "", f"Plain RL needs {ratio:.1f} times the trained steps (mean over seeds).", ""])


if __name__ == "__main__":
    main()
