"""A tiny training with StopOnFile: `python -m tests.relex.callbacks.stopping_trainer OUT PORT` runs it on two ranks.

The second rank writes OUT/STOP when step 5 is done there, a while after the first looked for it. Each rank leaves the
step at which it ended in OUT/rank-N, and the names of all modules that were imported are in OUT/modules.
"""

import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from relex.callbacks import StopOnFile

STEPS = 12
SECONDS = 60.0


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.layer(x) - labels) ** 2).mean()}


class Points(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor([index / 1000]), "labels": torch.tensor([index / 500])}


class WriteAtStep(TrainerCallback):
    def __init__(self, path: Path, step: int, *, seconds: float, after: Path | None = None) -> None:
        """Write `path` at the end of `step`, `seconds` after `after` is there."""
        self._path, self._step, self._seconds, self._after = path, step, seconds, after

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step == self._step:
            while self._after is not None and not self._after.exists():
                time.sleep(0.01)
            time.sleep(self._seconds)
            self._path.write_text("{}")


def train(out: Path, callbacks: list[TrainerCallback]) -> int:
    """Train up to STEPS steps, saving only when told to; return the step at which it ended."""
    arguments = TrainingArguments(
        output_dir=str(out / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    trainer = Trainer(model=Line(), args=arguments, train_dataset=Points(), callbacks=callbacks)
    trainer.train()
    return int(trainer.state.global_step)


def run_rank(out: Path, port: str, rank: int) -> None:
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ.update(places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    here = out / "first-rank-looks"
    # The second rank writes the file after the first has looked for it.
    before = WriteAtStep(out / "STOP", 5, seconds=1.0, after=here) if rank else WriteAtStep(here, 5, seconds=0)
    step = train(out, [before, StopOnFile(out / "STOP")])
    out.joinpath(f"rank-{rank}").write_text(str(step))


def main(out: Path, port: str) -> int:
    out.joinpath("modules").write_text("\n".join(sys.modules))
    # Forked, the two need one import; nothing of torch's or accelerate's has started yet.
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(out, port, rank), daemon=True) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        # A rank that waits for one which has ended waits for ever.
        process.join(SECONDS)
        process.kill()
        process.join()
    return max(abs(process.exitcode or 0) for process in ranks)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
