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
from flows.demo.grpo import Reward, Schedule
from flows.demo.task import DIGITS, Name, Split, problems
from relex.files.whole import write_whole
from relex.gram import Gram

STEPS = 480
PROBLEMS = {"selection": 500, "gate": 1000, "report": 1000}


# Supervised steps of the bases that need more than the demo's 400 for about a third of the answers.
SUPERVISED = {"product": 800}


@dataclass(frozen=True)
class Run:
    """One GRPO run of the demo's trainer; `dtype` is what base and checkpoints are stored in, `kept` is for tests.

    `lora` is the rank of an adapter (0: none), `width` and `layers` those of the model. `fresh` says what about a run
    no rule or constant had seen when it was fixed; it is empty for the runs that they were fixed on.
    """

    task: Name = "sort"
    seed: int = 0
    prompts: int = 32
    learning_rate: float = 4e-6
    dtype: torch.dtype = torch.float32
    kept: bool = False
    steps: int = STEPS
    save_steps: int = 2
    schedule: Schedule = "constant"
    reward: Reward = "exact"
    lora: int = 0
    width: int = 128
    layers: int = 2
    fresh: str = ""

    @property
    def trained(self) -> str:
        """Its directory in the cache; what is the rule goes without saying, so that other benchmarks find theirs."""
        name = f"seed-{self.seed}-prompts-{self.prompts}"
        name = name if self.task == "sort" else f"{self.task}-{name}"
        name = name if self.learning_rate == 4e-6 else f"{name}-lr-{self.learning_rate:.0e}"
        return "-".join([name, *self._unusual]).replace(" ", "-")

    @property
    def name(self) -> str:
        """What files call it."""
        name = f"{self.task}-seed-{self.seed}-prompts-{self.prompts}-lr-{self.learning_rate:.0e}-{self.stored}"
        return "-".join([name, *self._unusual]).replace(" ", "-")

    @property
    def title(self) -> str:
        """What a table calls it; 32 prompts, fp32 and what the old runs have in common go without saying."""
        said = {f"{self.prompts} prompts": self.prompts != 32, "bf16": self.dtype == torch.bfloat16}
        unusual = [words for words, is_said in said.items() if is_said]
        return ", ".join([self.task, f"seed {self.seed}", f"{self.learning_rate:.0e}", *unusual, *self._unusual])

    @property
    def _unusual(self) -> list[str]:
        """What the eight old runs have in common, where it is otherwise; short, since 60 letters name a run."""
        said = {
            f"{self.steps} steps": self.steps != STEPS,
            self.schedule: self.schedule != "constant",
            self.reward: self.reward != "exact",
            f"lora {self.lora}": self.lora > 0,
            f"{self.width} wide": self.width != 128,
        }
        return [words for words, unusual in said.items() if unusual]

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
# Listed, with the constants of every rule committed, before the first of them was trained. A high rate is planned for
# fewer steps, and then saved at every one, so that a window of 5 % has checkpoints enough.
FRESH = (
    Run(task="largest", seed=0, learning_rate=1e-5, fresh="task"),
    Run(task="product", seed=0, learning_rate=2e-5, steps=240, save_steps=1, fresh="task"),
    Run(task="sort", seed=3, learning_rate=5e-5, steps=240, save_steps=1, fresh="rate"),
    Run(task="largest", seed=1, learning_rate=5e-5, steps=240, save_steps=1, lora=8, fresh="task, adapter"),
    Run(task="add", seed=2, learning_rate=2e-5, dtype=torch.bfloat16, steps=240, save_steps=1, fresh="rate in bf16"),
    Run(task="product", seed=1, learning_rate=5e-5, steps=240, save_steps=1, schedule="linear", fresh="task, schedule"),
    Run(task="sort", seed=4, learning_rate=2e-5, steps=240, save_steps=1, schedule="cosine", fresh="schedule"),
    Run(task="largest", seed=2, learning_rate=2e-5, steps=240, save_steps=1, reward="credit", fresh="task, reward"),
    Run(task="sort", seed=5, prompts=16, learning_rate=1e-5, steps=160, save_steps=1, width=384, layers=3,
        fresh="5.3 million parameters"),
    Run(task="product", seed=2, learning_rate=1e-5, reward="credit", fresh="task, reward"),
    Run(task="largest", seed=3, learning_rate=4e-6, fresh="task"),
    Run(task="add", seed=3, prompts=16, learning_rate=5e-5, steps=240, save_steps=1, fresh="rate"),
)  # fmt: skip


def train(cache: Path, run: Run) -> Path:
    """Return the directory of a finished run, with base/ and run/ in it, trained if it is not there."""
    root = cache / run.trained
    if not (root / "run" / f"checkpoint-{run.steps}" / "trainer_state.json").is_file():
        # An unfinished run cannot be taken up: the trainer keeps weights only.
        shutil.rmtree(root / "run", ignore_errors=True)
        common = ["--task", run.task, "--seed", str(run.seed)]
        if not (root / "base").exists():
            model = ["--width", str(run.width), "--layers", str(run.layers)]
            supervised = ["--steps", str(SUPERVISED.get(run.task, 400))]
            _demo("pretrain", "--out", str(root / "base"), *common, *model, *supervised)
        sizes = ["--steps", str(run.steps), "--save-steps", str(run.save_steps), "--prompts", str(run.prompts)]
        how = ["--learning-rate", str(run.learning_rate), "--schedule", run.schedule, "--reward", run.reward]
        adapter = ["--lora", str(run.lora)]
        _demo("trainer", "--base", str(root / "base"), "--out", str(root / "run"), *common, *sizes, *how, *adapter)
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
