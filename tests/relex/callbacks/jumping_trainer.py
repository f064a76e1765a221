"""A tiny regression in transformers' Trainer with JumpCallback: here, in a process that is killed, on two ranks.

`python -m tests.relex.callbacks.jumping_trainer OUT KILL_AT` trains into OUT, killed by SIGKILL at the end of step
KILL_AT (0: not), and goes on from the last checkpoint that it finds; `… OUT ranks PORT` trains on two ranks, and
`… OUT shards PORT` moves weights that two ranks share. What came out is in OUT/result-RANK.json.
"""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from relex.callbacks import JumpCallback
from relex.callbacks.weights import copies, place, sharded

STEPS = 30
SECONDS = 100.0


class Curve(torch.nn.Module):
    """Learns a line through dropout and noise, slowly; `frozen` is not trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = torch.nn.Linear(4, 1)
        self.frozen = torch.nn.Linear(4, 1)
        self.frozen.requires_grad_(False)
        self.dropout = torch.nn.Dropout(0.2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": ((self.layer(self.dropout(x)) + self.frozen(x) - labels) ** 2).mean()}


class Points(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int, seed: int) -> None:
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(count, 4, generator=source)
        self.labels = self.x @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 0.1 * torch.randn(count, generator=source)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index : index + 1]}


def make(out: Path, callbacks: Sequence[TrainerCallback], **more: Any) -> Any:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "logging_steps": 5,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "ddp_backend": "gloo" if "RANK" in os.environ else None,
    }
    points = more.pop("eval_dataset", Points(40, 2))
    model = more.pop("model", None) or Curve()
    optimizers = more.pop("optimizers", (None, None))
    arguments = TrainingArguments(output_dir=str(out / "run"), **(settings | more))
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Points(400, 1),
        eval_dataset=points,
        callbacks=list(callbacks),
        optimizers=optimizers,
    )


def weights(trainer: Any) -> dict[str, list[Any]]:
    return {name: parameter.detach().tolist() for name, parameter in trainer.model.named_parameters()}


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def latest(run: Path) -> str | None:
    steps = [int(path.parent.name.split("-")[1]) for path in run.glob("checkpoint-*/trainer_state.json")]
    return str(run / f"checkpoint-{max(steps)}") if steps else None


def result(trainer: Any, jump: JumpCallback) -> dict[str, Any]:
    looks = {str(step): look.kept for step, look in jump.looks.items()}
    gained = [line["jump/gained"] for line in trainer.state.log_history if "jump/gained" in line]
    return {"weights": weights(trainer), "looks": looks, "step": trainer.state.global_step, "gained": gained[-1]}


def run_rank(out: Path, rank: int) -> None:
    own = JumpCallback(6)
    first = make(out, [own])
    first.train()

    def opposed(trainer: Any) -> float:
        # Every process thinks otherwise of a jump; the first one's word counts.
        # Trained towards 3.
        weight = float(trainer.model.layer.weight[0, 2])
        return weight if rank == 0 else -weight

    told = JumpCallback(6, score=opposed)
    second = make(out, [told])
    second.train()
    results = {"evaluate": result(first, own), "score": result(second, told)}
    out.joinpath(f"result-{rank}.json").write_text(json.dumps(results))


def run_shard(out: Path, rank: int) -> None:
    """Move weights of which each rank stores half, from a state in which the last forward pass has gathered them."""
    torch.distributed.init_process_group("gloo")
    model: Any = Curve().eval()
    reference = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    before = copies(model)
    with torch.no_grad():
        model.layer.weight.add_(1.0)
    now = copies(model)
    points = Points(4, 1)
    with torch.no_grad():
        model(points.x, points.labels[:, None])
        place(model, now, before, share=2.0)
        loss = model(points.x, points.labels[:, None])["loss"]
    outcome: dict[str, Any] = {"sharded": sharded(model)}
    model.reshard()
    moved = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    reference["layer.weight"] += 3.0
    whole = Curve().eval()
    whole.load_state_dict(reference)
    expected = whole(points.x, points.labels[:, None])["loss"]
    outcome |= {
        "alike": all(torch.equal(moved[name], reference[name]) for name in reference),
        "losses": [loss.item(), expected.item()],
        "stored": sum(tensor.numel() for tensor in now.values()),
    }
    out.joinpath(f"result-{rank}.json").write_text(json.dumps(outcome))
    torch.distributed.destroy_process_group()


def start(work: Any, out: Path, port: str, rank: int) -> None:
    places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    os.environ.update(places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    work(out, rank)


def main(out: Path, *rest: str) -> int:
    works = {"ranks": run_rank, "shards": run_shard}
    if rest[0] in works:
        context = multiprocessing.get_context("fork")
        ranks = [
            context.Process(target=start, args=(works[rest[0]], out, rest[1], rank), daemon=True) for rank in range(2)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(SECONDS)
            process.kill()
            process.join()
        return max(abs(process.exitcode or 0) for process in ranks)
    jump = JumpCallback(6)
    trainer = make(out, [jump, KillAt(int(rest[0]))], save_strategy="steps", save_steps=4)
    checkpoint = latest(out / "run")
    trainer.train(resume_from_checkpoint=checkpoint)
    out.joinpath("result-0.json").write_text(json.dumps(result(trainer, jump)))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *sys.argv[2:]))
