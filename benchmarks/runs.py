"""Real tiny GRPO runs, trained once into a cache, and what of them the tests keep.

The cache is the one of benchmarks/ablation.py, whose runs are taken up.
"""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from benchmarks.ablation import stored_as
from evaluation.benchmarks.benchmark import write_benchmark
from flows.demo.task import DIGITS, Name, Split, problems
from relex.files.whole import write_whole
from relex.gram import Gram

STEPS, SAVE_STEPS = 480, 2
PROBLEMS = {"selection": 500, "gate": 1000, "report": 1000}


@dataclass(frozen=True)
class Run:
    """One GRPO run of the demo's trainer; `dtype` is what base and checkpoints are stored in, `kept` is for tests."""

    task: Name = "sort"
    seed: int = 0
    prompts: int = 32
    learning_rate: float = 4e-6
    dtype: torch.dtype = torch.float32
    kept: bool = False

    @property
    def trained(self) -> str:
        """Its directory in the cache; what is the rule goes without saying, so that other benchmarks find theirs."""
        name = f"seed-{self.seed}-prompts-{self.prompts}"
        name = name if self.task == "sort" else f"{self.task}-{name}"
        return name if self.learning_rate == 4e-6 else f"{name}-lr-{self.learning_rate:.0e}"

    @property
    def name(self) -> str:
        """What files call it."""
        return f"{self.task}-seed-{self.seed}-prompts-{self.prompts}-lr-{self.learning_rate:.0e}-{self.stored}"

    @property
    def title(self) -> str:
        """What a table calls it."""
        return f"{self.task}, seed {self.seed}, {self.prompts} prompts, lr {self.learning_rate:.0e}, {self.stored}"

    @property
    def stored(self) -> str:
        """Its dtype in four letters."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"


RUNS = (
    Run(),
    Run(seed=1, prompts=8, kept=True),
    Run(seed=2, dtype=torch.bfloat16),
    Run(seed=1, prompts=8, dtype=torch.bfloat16),
    Run(learning_rate=1e-5),
    Run(seed=1, learning_rate=2e-5, kept=True),
    Run(task="add"),
    Run(task="add", seed=1, learning_rate=1e-5),
)


def train(cache: Path, run: Run) -> Path:
    """Return the directory of a finished run, with base/ and run/ in it, trained if it is not there."""
    root = cache / run.trained
    if not (root / "run" / f"checkpoint-{STEPS}" / "trainer_state.json").is_file():
        # An unfinished run cannot be taken up: the trainer keeps weights only.
        shutil.rmtree(root / "run", ignore_errors=True)
        common = ["--task", run.task, "--seed", str(run.seed)]
        if not (root / "base").exists():
            _demo("pretrain", "--out", str(root / "base"), *common)
        sizes = ["--steps", str(STEPS), "--save-steps", str(SAVE_STEPS), "--prompts", str(run.prompts)]
        rate = ["--learning-rate", str(run.learning_rate)]
        _demo("trainer", "--base", str(root / "base"), "--out", str(root / "run"), *common, *sizes, *rate)
    return stored_as(root, None if run.dtype == torch.float32 else run.dtype)


def _demo(module: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"flows.demo.{module}", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.stderr)


def held_out(out: Path, name: Name) -> dict[Split, Path]:
    """Return the benchmark of each held-out split of a task, written once."""
    splits: tuple[Split, ...] = ("selection", "gate", "report")
    return {
        split: write_benchmark(
            out, f"{name}-{split}", problems(split, PROBLEMS[split], name=name), max_new_tokens=DIGITS + 1
        )
        for split in splits
    }


def kept_steps() -> list[int]:
    """Return the steps that a kept Gram has: 12 checkpoints up to step 24, then ever fewer."""
    return [*range(2, 24, 2), *range(24, 48, 4), *range(48, 96, 8), *range(96, 192, 16), *range(192, STEPS + 1, 32)]


def keep_gram(gram: Gram, path: Path) -> None:
    """Write some checkpoints of a Gram: the lower triangles of its products, and what identifies them."""
    thin = gram.rows([gram.steps.index(step) for step in kept_steps()])
    rows, columns = torch.tril_indices(len(thin.steps), len(thin.steps))
    metadata = {"steps": thin.steps, "names": thin.names, "base_digest": thin.base_digest, "digests": thin.digests}
    content = save(
        {"lower": thin.products[:, rows, columns].contiguous(), "base_norms": thin.base_norms},
        metadata={"relex": json.dumps(metadata)},
    )
    write_whole(content, path)
    # What is made in a temporary file is private, and these are shared.
    path.chmod(0o644)
