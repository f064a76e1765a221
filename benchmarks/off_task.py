"""Off-task damage: what a model that is predicted beyond a run's window loses where nothing was rewarded.

A base that is supervised on two tasks, sorting after `518698=` as the demo's authors do and sums of pairs after
`518698==`, always right; GRPO rewards sorting alone. From the window, models are predicted further and further, and
they and the real later checkpoints are scored on both tasks, paired against the last observed checkpoint. Beside stands
KL(model ‖ base) in nats a token, on the prompts of each task (see evaluation.answers.divergence).

    python -m benchmarks.off_task --cache DIR --seed 0   # a few minutes on one core

writes benchmarks/results/off-task-seed-0.json. All numbers were fixed before the first run.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from evaluation.answers.divergence import divergence
from evaluation.benchmarks.benchmark import write_benchmark
from evaluation.child import kept_children
from flows.demo import task
from flows.demo.model import EOS, build_model, build_tokenizer
from flows.demo.pretrain import publish
from flows.demo.sft import LEARNING_RATE, rate
from flows.study.compare import Plan, Scoring, compare
from flows.study.resources import Resources
from relex.predictors import parse_method

RESULTS = Path(__file__).parent / "results"
SUPERVISED, BATCH = 800, 48
STEPS, SAVE_STEPS, RATE = 144, 4, 1e-5
WINDOW = 48
METHODS = ("secant", "relex")
TARGETS = (72, 96, 144, 240, 360)
PROBLEMS = 500


def second(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Return the same numbers as problems of the second task."""
    return [{"prompt": f"{row['prompt']}=", "answer": task.answer_to(row["prompt"], name="add")} for row in rows]


def supervise(out: Path, *, seed: int) -> None:
    """Write a base that half of every batch taught to sort, as the demo's authors do, and half to add."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=seed)
    half = SUPERVISED * BATCH // 2
    taught = task.corpus(half, seed=seed), second(task.problems("train", half, seed=seed + 100))
    texts = [
        torch.tensor(tokenizer([row["prompt"] + row["answer"] + EOS for row in rows]).input_ids) for rows in taught
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, SUPERVISED))
    model.train()
    for parts in zip(*(torch.split(tokens, BATCH // 2) for tokens in texts), strict=True):
        optimizer.zero_grad()
        for tokens_BT in parts:
            start = tokens_BT.shape[1] - task.DIGITS - 1
            logits_BTV = model(input_ids=tokens_BT[:, :-1]).logits[:, start - 1 :]
            loss = cross_entropy(logits_BTV.flatten(0, 1), tokens_BT[:, start:].flatten()) / len(parts)
            torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    publish(model, tokenizer, out)


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    root = given.cache.absolute() / f"off-task-seed-{given.seed}"
    root.mkdir(parents=True, exist_ok=True)
    base, run = root / "base", root / "run"
    if not base.exists():
        supervise(base, seed=given.seed)
    if not (run / f"checkpoint-{STEPS}" / "trainer_state.json").is_file():
        options = ["--base", base, "--out", run, "--steps", STEPS, "--save-steps", SAVE_STEPS, "--seed", given.seed]
        command = [sys.executable, "-m", "flows.demo.trainer", *map(str, options), "--learning-rate", f"{RATE:g}"]
        subprocess.run(command, check=True)
    rows = task.problems("report", PROBLEMS)
    benchmarks = tuple(
        str(write_benchmark(root / "benchmarks", name, problems, max_new_tokens=task.DIGITS + 1))
        for name, problems in (("sort", rows), ("add", second(rows)))
    )
    with kept_children():
        comparison = compare(
            str(run),
            str(base),
            Plan(tuple(map(parse_method, METHODS)), TARGETS, window=WINDOW),
            Scoring(benchmarks, batch_size=250),
            Resources(256 << 20, 1, root / "cache"),
            out=root / "compared",
        )
        models = [Path(row.model) for row in comparison.rows]
        measured = [divergence(models, base, each, cache=root / "cache") for each in benchmarks]
    written = [
        {
            "role": row.role,
            "method": row.name,
            "step": row.step,
            **{score.benchmark: {key: value for key, value in asdict(score).items() if key != "benchmark"}
               for score in row.accuracies},
            "nats": {each.benchmark: each.nats[number] for each in measured},
        }
        for number, row in enumerate(comparison.rows)
    ]  # fmt: skip
    content = {
        "command": f"python -m benchmarks.off_task --cache DIR --seed {given.seed}",
        "rewarded": "sort",
        "window": WINDOW,
        "learning_rate": RATE,
        "prompts": measured[0].prompts,
        "models": written,
    }
    path = RESULTS / f"off-task-seed-{given.seed}.json"
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for row in written:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
