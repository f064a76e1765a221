"""JumpCallback in transformers' own Trainer: what it gains, what it leaves alone, kills, and two processes."""

import json
import logging
import os
import random
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from relex.callbacks import JumpCallback, ladder, weights
from tests.relex.callbacks.jumping_trainer import STEPS, Curve, make
from tests.relex.callbacks.jumping_trainer import weights as weights_of


class Events(TrainerCallback):
    """What a callback of somebody else sees."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(f"evaluated {state.global_step}")

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append("predicted")

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not any(name.startswith("jump/") for name in kwargs["logs"]):
            self.seen.append(f"logged {state.global_step}")


def lines(trainer: Any, *, jumps: bool) -> list[dict[str, float]]:
    """The log of a training, without what a clock says."""
    clocks = ("runtime", "per_second")
    return [
        {name: value for name, value in line.items() if not name.endswith(clocks)}
        for line in trainer.state.log_history
        if ("jump/steps" in line) == jumps
    ]


class Noisy:
    """Draws from every generator and changes what a careless function may; staying always scores best."""

    def __init__(self) -> None:
        self.looked_at = 0

    def __call__(self, trainer: Any) -> float:
        assert not trainer.model.training
        assert not torch.is_grad_enabled()
        trainer.model.dropout.train()
        drawn = random.random() + float(np.random.rand()) + float(torch.rand(()))
        staying, self.looked_at = self.looked_at != trainer.state.global_step, trainer.state.global_step
        return float(staying) + 0 * drawn


def test_a_run_that_goes_straight_gets_there_in_fewer_steps_and_says_so_in_its_log(tmp_path: Path) -> None:
    plain = make(tmp_path, [])
    plain.train()
    jump = JumpCallback(6)
    jumping = make(tmp_path, [jump])
    jumping.train()
    assert jumping.state.global_step == STEPS
    assert jumping.evaluate()["eval_loss"] < 0.7 * plain.evaluate()["eval_loss"]
    told = lines(jumping, jumps=True)
    assert [line["step"] for line in told] == list(jump.looks)
    assert [line["jump/steps"] for line in told] == [look.kept for look in jump.looks.values()]
    assert told[-1]["jump/gained"] == sum(look.kept for look in jump.looks.values()) > STEPS
    first = told[0]
    assert first["step"] == 6
    assert first["jump/best"] > first["jump/stay"]
    assert first["jump/p"] <= ladder.LEVEL
    # A pair for each batch of the evaluation: 20 are enough for a test.
    assert first["jump/stay"] < 0


def test_jumps_that_do_not_pay_change_nothing_that_is_trained_logged_or_seen(tmp_path: Path) -> None:
    collected = []
    for callbacks in ([], [JumpCallback(4, score=Noisy())]):
        events = Events()
        trainer = make(tmp_path, [*callbacks, events], eval_strategy="steps", eval_steps=3, logging_steps=2)
        trainer.train()
        collected.append(
            (weights_of(trainer), lines(trainer, jumps=False), events.seen, trainer.model.dropout.training)
        )
    assert collected[0] == collected[1]
    assert [line["jump/steps"] for line in lines(trainer, jumps=True)] == [0, 0, 0]


def test_evaluating_jumps_changes_nothing_either_and_is_no_evaluation_of_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Below what the test can show, and above what it would take too few scores for a test for.
    monkeypatch.setattr(ladder, "LEVEL", 1e-5)
    collected = []
    for callbacks in ([], [JumpCallback(4)]):
        events = Events()
        stopping = EarlyStoppingCallback(early_stopping_patience=8)
        settings = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "metric_for_best_model": "loss"}
        trainer = make(tmp_path, [*callbacks, events, stopping], save_strategy="best", **settings)
        trainer.train()
        collected.append((weights_of(trainer), lines(trainer, jumps=False), events.seen))
    assert collected[0] == collected[1]
    assert "prediction_step" not in vars(trainer)


def test_looks_that_do_not_pay_come_at_longer_and_longer_distances_and_one_that_does_brings_them_back(
    tmp_path: Path,
) -> None:
    def score(trainer: Any) -> float:
        # Staying is best up to step 14, and after it the first rung.
        return float(trainer.state.global_step > 14) * float(abs(trainer.model.layer.bias.item() - start))

    jump = JumpCallback(2, score=score)
    trainer = make(tmp_path, [jump])
    start = trainer.model.layer.bias.item()
    trainer.train()
    steps = list(jump.looks)
    assert steps[:3] == [2, 6, 14]
    paid = [step for step in steps if jump.looks[step].kept]
    assert paid
    assert all(later - step == 2 for step, later in pairwise(steps) if step in paid)


@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()])
def test_when_scoring_fails_or_is_interrupted_the_weights_are_those_before_it(
    tmp_path: Path, error: BaseException
) -> None:
    kept: list[weights.Copies] = []

    def score(trainer: Any) -> float:
        kept.append(weights.copies(trainer.model))
        if len(kept) == 3:
            raise error
        return float(len(kept))

    trainer = make(tmp_path, [JumpCallback(4, score=score)])
    with pytest.raises(type(error)):
        trainer.train()
    now = weights.copies(trainer.model)
    assert not torch.equal(kept[2]["layer.weight"], kept[0]["layer.weight"])
    assert all(torch.equal(now[name].view(torch.int32), kept[0][name].view(torch.int32)) for name in now)
    assert trainer.callback_handler.callbacks
    assert trainer.model.training


def test_a_jump_to_weights_that_are_not_finite_is_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "BLOCKS", (1e300, 1e301))
    asked: list[float] = []

    def score(trainer: Any) -> float:
        asked.append(float(trainer.model.layer.weight.sum()))
        return len(asked)

    jump = JumpCallback(4, score=score)
    trainer = make(tmp_path, [jump], max_steps=5)
    trainer.train()
    assert len(asked) == 1
    assert jump.looks[4].kept == 0
    assert all(np.isnan(rung.score) for rung in jump.looks[4].rungs)


def test_what_cannot_be_jumped_with_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"JumpCallback\(every=1\): a block has no middle; give 2 or more"):
        JumpCallback(1)
    with pytest.raises(
        ValueError, match="nothing to score jumps with: give the trainer an eval_dataset, or JumpCallback"
    ):
        make(tmp_path, [JumpCallback(4)], eval_dataset=None).train()

    class TwoModes(torch.optim.SGD):
        def eval(self) -> None: ...

    model = Curve()
    with pytest.raises(ValueError, match="JumpCallback with TwoModes: it evaluates other weights than it trains"):
        make(tmp_path, [JumpCallback(4)], model=model, optimizers=(TwoModes(model.parameters(), lr=0.1), None)).train()


def test_the_line_is_computed_in_fp32_and_rounded_once_and_no_jump_is_bit_for_bit() -> None:
    torch.manual_seed(0)
    model = Curve().to(torch.bfloat16)
    before = weights.copies(model)
    with torch.no_grad():
        model.layer.weight.add_(torch.randn_like(model.layer.weight) * 0.01)
    now = weights.copies(model)
    assert set(now) == {"layer.weight", "layer.bias"}
    assert weights.place(model, now, before, share=2.5)
    latest, earlier = now["layer.weight"].float(), before["layer.weight"].float()
    assert torch.equal(model.layer.weight, (latest + 2.5 * (latest - earlier)).to(torch.bfloat16))
    assert weights.place(model, now, before, share=0)
    assert torch.equal(model.layer.weight.view(torch.int16), now["layer.weight"].view(torch.int16))
    assert not weights.place(model, now, before, share=1e39)


def run_trainer(out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.relex.callbacks.jumping_trainer", str(out), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.slow
def test_a_training_that_is_killed_goes_on_with_the_same_looks_and_ends_at_the_same_weights(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_trainer(whole, 0).returncode == 0
    # Step 11 lies in a block that began at step 6 and whose middle, step 9, is not in the checkpoint of step 8.
    assert run_trainer(killed, 11).returncode == -signal.SIGKILL
    # Step 23: the middle of the block is in the checkpoint of step 20 or 22 at the latest.
    assert run_trainer(killed, 23).returncode == -signal.SIGKILL
    done = run_trainer(killed, 0)
    assert done.returncode == 0, done.stderr
    expected, content = (json.loads((out / "result-0.json").read_text()) for out in (whole, killed))
    assert len(expected["looks"]) > 3
    assert content["looks"].items() <= expected["looks"].items()
    assert content["looks"]
    assert (content["weights"], content["step"], content["gained"]) == (
        expected["weights"],
        expected["step"],
        expected["gained"],
    )


def test_a_checkpoint_without_its_block_begins_one_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, [], save_strategy="steps", save_steps=10, max_steps=10).train()
    jump = JumpCallback(6)
    trainer = make(tmp_path, [jump])
    with caplog.at_level(logging.WARNING, "relex.callbacks.jump"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-10"))
    assert [record.getMessage() for record in caplog.records if record.name == "relex.callbacks.jump"] == [
        f"{tmp_path}/run/checkpoint-10/jump.pt has no block of 6 steps to go on with: one begins at step 10"
    ]
    assert next(iter(jump.looks)) == 16


def test_a_checkpoint_of_weights_only_gets_nothing_to_go_on_with(tmp_path: Path) -> None:
    make(tmp_path, [JumpCallback(6)], save_strategy="steps", save_steps=10, save_only_model=True, max_steps=10).train()
    assert not list(tmp_path.glob("run/checkpoint-10/jump*"))


def on_two_ranks(out: Path, what: str) -> list[dict[str, Any]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    done = run_trainer(out, what, port)
    assert done.returncode == 0, done.stderr
    return [json.loads((out / f"result-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_decide_alike_and_end_at_the_same_weights(tmp_path: Path) -> None:
    first, second = on_two_ranks(tmp_path, "ranks")
    assert first == second
    assert all(sum(first[way]["looks"].values()) > 0 for way in ("evaluate", "score"))


@pytest.mark.slow
def test_of_weights_that_two_processes_share_each_moves_its_own_part(tmp_path: Path) -> None:
    ranks = on_two_ranks(tmp_path, "shards")
    assert all(each["alike"] and each["sharded"] for each in ranks)
    assert sum(each["stored"] for each in ranks) == 5
    # What the pass before had gathered is not used again.
    assert all(each["losses"][0] == pytest.approx(each["losses"][1]) for each in ranks)
