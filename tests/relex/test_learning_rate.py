"""The learning rate of a run, by the trainer's own word or by the weights, and the method that asks for it."""

import json
from pathlib import Path

import pytest
import torch

from relex.errors import TargetError
from relex.extrapolation import Request, extrapolate
from relex.learning_rate import learning_rate
from relex.output import manifest
from relex.predictors import parse_method
from tests.helpers.trajectories import MIB, STEPS, TARGET, Run, drift, load, write_run

LAST = STEPS[-1]


def log(run: Run, *entries: object) -> None:
    (run.run / f"checkpoint-{LAST}" / "trainer_state.json").write_text(json.dumps({"log_history": entries}))


def rate(run: Run) -> tuple[float, str]:
    told = learning_rate(run.open(), memory=64 * MIB, threads=2)
    return told.value, told.told_by


def test_the_trainers_last_rate_at_the_checkpoint_is_taken(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift(stored=torch.float32))
    rates = ({"step": 10, "learning_rate": 5e-6}, {"step": LAST, "learning_rate": 3e-6, "loss": 0.1}, {"step": LAST})
    log(run, *rates, {"step": LAST + 1, "learning_rate": 1.0})
    assert rate(run) == (3e-6, f"trainer_state.json of step {LAST}")


@pytest.mark.parametrize("state", ["[]", '{"log_history": [{"learning_rate": "fast"}]}', '{"log_history": []}'])
def test_a_state_that_does_not_say_leaves_it_to_the_weights(tmp_path: Path, state: str) -> None:
    states = drift(stored=torch.float32, base=torch.float32)
    run = write_run(tmp_path, states)
    (run.run / f"checkpoint-{LAST}" / "trainer_state.json").write_text(state)
    moving = [name for name, tensor in states[0].items() if tensor.is_floating_point()]
    largest = max(float((states[LAST][name] - states[0][name]).abs().max()) for name in moving)
    value, told_by = rate(run)
    assert value == pytest.approx(largest / LAST)
    assert told_by == f"the weights of step {LAST}"


def test_under_adam_the_weights_tell_the_rate(tmp_path: Path) -> None:
    states = drift(stored=torch.float32, base=torch.float32)
    weight = torch.nn.Parameter(states[0]["lm_head.weight"].clone())
    optimizer = torch.optim.Adam([weight], lr=2e-5)
    for step in range(1, LAST + 1):
        weight.grad = 1.0 + 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(step))
        optimizer.step()
        if step in STEPS:
            states[step] = dict(states[0]) | {"lm_head.weight": weight.detach().clone()}
    assert rate(write_run(tmp_path, states))[0] == pytest.approx(2e-5, rel=0.1)


def test_rounded_weights_do_not_tell_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift(stored=torch.bfloat16))
    with pytest.raises(TargetError, match=r"stored in 16 bits, whose rounding is larger than a step\. Give it as"):
        rate(run)
    log(run, {"step": LAST, "learning_rate": 3e-6})
    assert rate(run)[0] == 3e-6


def test_a_prediction_by_travel_says_which_rate_it_took(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift(stored=torch.float32, base=torch.float32))
    log(run, {"step": LAST, "learning_rate": 1e-5})
    out = {spec: tmp_path / str(number) for number, spec in enumerate(("travel", "travel:lr=1e-5"))}
    requests = [Request(parse_method(spec), TARGET, directory) for spec, directory in out.items()]
    extrapolate(run.open(), requests, grams=tmp_path / "grams", memory=64 * MIB, threads=1)
    read, given = (load(directory) for directory in out.values())
    assert all(torch.equal(read[name], given[name]) for name in given)
    families = [manifest.read(directory).forecast.description["family"]["Travel"] for directory in out.values()]
    assert [(family["lr"], family["told_by"]) for family in families] == [
        (1e-5, f"trainer_state.json of step {LAST}"),
        (1e-5, "the method's lr"),
    ]
