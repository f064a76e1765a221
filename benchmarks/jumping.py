"""Jump and go on against plain RL: trained steps, generated answers and seconds to the same accuracy.

The demo's model, three tasks, learning rates and seeds; each run plain and with JumpCallback, whose ladder is scored
greedily on 128 selection problems, every answer counted. Accuracy is greedy on 500 other problems, every 4 steps, and
its seconds do not count. Two more arms: `reset` empties Adam's moments after a jump, `evaluate` scores by the trainer's
own evaluation, one sampled answer a problem. A finished run is one small file in --out, so a call after a kill
goes on with the next; jumping.md there is the table of what is finished. A run takes one to four minutes on a core.

    .venv/bin/python -m benchmarks.jumping --out benchmarks/results/jumping --cache /tmp/jumping [--minutes 5]
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

# Before anything imports torch: the threads of a model this small only fight each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from flows.demo import task
from relex.callbacks import JumpCallback
from relex.files.whole import write_whole

PROMPTS, GENERATIONS = 32, 8
SCORED, MEASURED, MEASURE_STEPS = 128, 500, 4
ARMS = ("plain", "jump", "reset", "evaluate")
# Steps of a block and of the run, by learning rate: a block has to move the weights by more than Adam's noise.
EVERY = {1e-5: 24, 2e-5: 12, 5e-5: 8, 1e-4: 8}
STEPS = {
    "sort": {1e-5: 160, 5e-5: 60, 1e-4: 40},
    "add": {2e-5: 120, 5e-5: 80},
    "revcomp": {2e-5: 120, 5e-5: 80, 1e-4: 48},
}
# In this order: rates at which plain RL is best first.
GRID = (
    ("sort", 5e-5),
    ("sort", 1e-4),
    ("add", 5e-5),
    ("revcomp", 5e-5),
    ("revcomp", 1e-4),
    ("add", 2e-5),
    ("revcomp", 2e-5),
    ("sort", 1e-5),
)
SEEDS = (0, 1)
TARGETS = {"sort": (0.80, 0.90, 0.95), "add": (0.70, 0.80), "revcomp": (0.80, 0.90, 0.95)}


@dataclass(frozen=True)
class Run:
    task: task.Name
    rate: float
    seed: int
    arm: str

    @property
    def name(self) -> str:
        return f"{self.task}-{self.rate:.0e}-seed-{self.seed}-{self.arm}"


@dataclass
class Cost:
    """What a run has used up so far, measuring it left out."""

    answers: int = 0
    tokens: int = 0
    began: float = 0.0
    measuring: float = 0.0

    def add(self, answers: int, tokens: int) -> None:
        self.answers += answers
        self.tokens += tokens

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began - self.measuring


class Measure(TrainerCallback):
    def __init__(self, run: Run, cost: Cost) -> None:
        self.problems, self.cost = task.problems("gate", MEASURED, name=run.task), cost
        self.curve: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self.cost.began = time.monotonic()
        self._measure(state.global_step, kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if state.global_step % MEASURE_STEPS == 0:
            self._measure(state.global_step, kwargs)

    def _measure(self, step: int, kwargs: dict[str, Any]) -> None:
        cost = {"answers": self.cost.answers, "tokens": self.cost.tokens, "seconds": round(self.cost.seconds, 2)}
        began = time.monotonic()
        model = kwargs["model"]
        training = model.training
        right, _ = greedy(model.eval(), kwargs["processing_class"], self.problems)
        model.train(training)
        self.curve.append({"step": step, **cost, "accuracy": sum(right) / len(right)})
        self.cost.measuring += time.monotonic() - began


class ResetAdam(TrainerCallback):
    def __init__(self, jump: JumpCallback) -> None:
        self.jump = jump

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        look = self.jump.looks.get(state.global_step)
        if look is not None and look.kept:
            kwargs["optimizer"].state.clear()


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, problems: Sequence[dict[str, str]]) -> tuple[list[float], int]:
    """Return which problems are answered rightly, and how many tokens were generated."""
    inputs = tokenizer([row["prompt"] for row in problems], return_tensors="pt")
    out = model.generate(
        **{name: inputs[name] for name in ("input_ids", "attention_mask")},
        do_sample=False,
        max_new_tokens=task.DIGITS + 1,
        pad_token_id=tokenizer.pad_token_id,
    )
    written = out[:, inputs["input_ids"].shape[1] :]
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    right = [task.reward(answer, row["answer"]) for answer, row in zip(answers, problems, strict=True)]
    return right, int((written != tokenizer.pad_token_id).sum())


def train(run: Run, base: Path, scratch: Path) -> dict[str, Any]:
    steps, every = STEPS[run.task][run.rate], EVERY[run.rate]
    cost = Cost()
    selection = task.problems("selection", SCORED, name=run.task)

    def reward(completions: list[str], completion_ids: list[list[int]], answer: list[str], **_: Any) -> list[float]:
        cost.add(len(completions), sum(map(len, completion_ids)))
        return [task.reward(completion, right) for completion, right in zip(completions, answer, strict=True)]

    def score(trainer: Any) -> list[float]:
        right, tokens = greedy(trainer.model, trainer.processing_class, selection)
        cost.add(len(right), tokens)
        return right

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(base),
        reward_funcs=cast(Any, reward),
        train_dataset=Dataset.from_list(task.problems("train", steps * PROMPTS, seed=run.seed, name=run.task)),
        eval_dataset=Dataset.from_list(selection) if run.arm == "evaluate" else None,
        args=GRPOConfig(
            output_dir=str(scratch),
            seed=run.seed,
            max_steps=steps,
            per_device_train_batch_size=PROMPTS * GENERATIONS,
            per_device_eval_batch_size=SCORED,
            num_generations=GENERATIONS,
            num_generations_eval=1,
            max_completion_length=task.DIGITS + 1,
            learning_rate=run.rate,
            lr_scheduler_type="constant",
            beta=0.0,
            loss_type="dapo",
            scale_rewards="group",
            shuffle_dataset=False,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.remove_callback(PrinterCallback)
    jump = JumpCallback(every, score=None if run.arm == "evaluate" else score)
    measure = Measure(run, cost)
    if run.arm != "plain":
        trainer.add_callback(jump)
    if run.arm == "reset":
        trainer.add_callback(ResetAdam(jump))
    trainer.add_callback(measure)
    trainer.train()
    looks = [
        {
            "step": step,
            "stay": look.stay,
            "rungs": [[rung.steps, rung.score] for rung in look.rungs],
            "kept": look.kept,
            "p": look.p,
        }
        for step, look in jump.looks.items()
    ]
    return {"run": vars(run), "every": every, "steps": steps, "curve": measure.curve, "looks": looks}


def base_of(cache: Path, run: Run) -> Path:
    base = cache / f"{run.task}-seed-{run.seed}"
    if not base.exists():
        arguments = ["--out", str(base), "--seed", str(run.seed), "--task", run.task]
        done = subprocess.run(
            [sys.executable, "-m", "flows.demo.pretrain", *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            sys.exit(done.stderr)
    return base


def reached(result: dict[str, Any], accuracy: float) -> dict[str, float] | None:
    """Return the first point of a run's curve that has the accuracy."""
    return next((point for point in result["curve"] if point["accuracy"] >= accuracy), None)


def cell(result: dict[str, Any], accuracy: float) -> str:
    point = reached(result, accuracy)
    if point is None:
        return "–"
    return f"{point['step']} ({point['answers'] / 1000:.1f}k, {point['seconds']:.0f} s)"


def table(out: Path) -> str:
    """Return the table of what is finished: each cell plain → jump; the plain rate that is best at a target in bold."""
    runs = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json"))}
    seeds = sorted({result["run"]["seed"] for result in runs.values()})
    lines = [
        f"Steps (generated answers, seconds) to an accuracy on {MEASURED} problems, plain → with jumps.",
        "",
        "| task, learning rate, seed | to .70 | .80 | .90 | .95 | to the end of plain: its accuracy"
        " | answers, jump / plain | accuracy at the last step | jumps kept / looks |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ratios: dict[str, list[float]] = {}
    for name, rate in GRID:
        for seed in seeds:
            plain, jump = (runs.get(Run(name, rate, seed, arm).name) for arm in ("plain", "jump"))  # type: ignore[arg-type]
            if plain is None or jump is None:
                continue
            best = best_rate(runs, name, seed)
            title = f"{name} {rate:.0e}, {seed}"
            cells = [
                f"{cell(plain, target)} → {cell(jump, target)}" if target in TARGETS[name] else ""
                for target in (0.70, 0.80, 0.90, 0.95)
            ]
            end = plain["curve"][-1]["accuracy"]
            first, second = reached(plain, end), reached(jump, end)
            ratio = None if first is None or second is None else second["answers"] / first["answers"]
            ratios.setdefault(f"{name} {rate:.0e}", []).append(float("inf") if ratio is None else ratio)
            kept = sum(look["kept"] > 0 for look in jump["looks"])
            lines.append(
                f"| {f'**{title}**' if rate == best else title} | {' | '.join(cells)}"
                f" | {end:.3f}: {cell(plain, end)} → {cell(jump, end)} | {'–' if ratio is None else f'{ratio:.2f}'}"
                f" | {end:.3f} → {jump['curve'][-1]['accuracy']:.3f} | {kept} / {len(jump['looks'])} |"
            )
    lines += ["", "Bold: the rate at which plain RL needs the fewest answers to the highest target it reaches.", ""]
    for arm in ("reset", "evaluate"):
        lines += arm_table(runs, arm)
    return "\n".join(lines)


def best_rate(runs: dict[str, Any], name: str, seed: int) -> float | None:
    """Return the rate at which plain RL reaches the highest target with the fewest answers."""
    reaching = []
    for rate in STEPS[name]:
        result = runs.get(Run(name, rate, seed, "plain").name)  # type: ignore[arg-type]
        if result is None:
            continue
        for target in TARGETS[name]:
            point = reached(result, target)
            if point is not None:
                reaching.append((-target, point["answers"], rate))
    return min(reaching)[2] if reaching else None


def arm_table(runs: dict[str, Any], arm: str) -> list[str]:
    """Return the lines that set an arm beside `jump`."""
    rows = []
    for result in runs.values():
        run = Run(**result["run"])
        other = runs.get(Run(run.task, run.rate, run.seed, "jump").name)
        if run.arm == arm and other is not None:
            target = TARGETS[run.task][-1]
            mean = [statistics.mean(point["accuracy"] for point in each["curve"][1:]) for each in (other, result)]
            rows.append(
                f"| {run.task} {run.rate:.0e}, {run.seed} | {cell(other, target)} → {cell(result, target)}"
                f" | {mean[0]:.3f} → {mean[1]:.3f}"
                f" | {other['curve'][-1]['accuracy']:.3f} → {result['curve'][-1]['accuracy']:.3f} |"
            )
    if not rows:
        return []
    head = [f"jump → {arm}:", "", "| run | to the highest target | mean accuracy over the run | at the last step |"]
    return [*head, "|---|---|---|---|", *rows, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="results, a file a run")
    parser.add_argument("--cache", type=Path, required=True, help="base models")
    parser.add_argument("--arms", nargs="+", default=["plain", "jump"], choices=ARMS)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--tasks", nargs="+", default=list(get_args(task.Name)))
    parser.add_argument("--rates", type=float, nargs="+", default=list(EVERY))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no further run after so many")
    options = parser.parse_args()
    began = time.monotonic()
    options.out.mkdir(parents=True, exist_ok=True)
    for name, rate in GRID:
        for seed in options.seeds:
            for arm in options.arms:
                run = Run(name, rate, seed, arm)  # type: ignore[arg-type]
                file = options.out / f"{run.name}.json"
                skipped = name not in options.tasks or rate not in options.rates or file.exists()
                if skipped or time.monotonic() - began > 60 * options.minutes:
                    continue
                scratch = options.cache / "scratch"
                shutil.rmtree(scratch, ignore_errors=True)
                write_whole(json.dumps(train(run, base_of(options.cache, run), scratch), indent=1).encode(), file)
                file.chmod(0o644)
                print(run.name, flush=True)
    text = table(options.out)
    (options.out / "jumping.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
