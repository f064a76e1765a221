import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from relex.errors import CheckpointDamagedError, DuplicateError
from relex.extrapolation import Request, extrapolate
from relex.files.local import LocalDirectory
from relex.gram import Gram
from relex.inspection import inspect
from relex.layouts.hf import SINGLE_FILE, open_model
from relex.output import manifest
from relex.predictors import parse_method
from relex.sanity import duplicates, findings, foreign, holes, increments, jumps, refuse_duplicates
from tests.helpers.trajectories import MIB, State, drift, measure, quiet, write_run

SHAPES = {"attention": (12, 10), "mlp": (30, 7), "norm": (5,)}


def walk(rates: Sequence[float], *, steps: Sequence[int] | None = None, noise: float = 0.3) -> dict[int, State]:
    """Return a base and a checkpoint a step that move by `rates` per step along a drift with noise."""
    generator = torch.Generator().manual_seed(0)
    steps = steps or range(1, len(rates) + 1)
    drift = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    state = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    states: dict[int, State] = {0: state}
    last = 0
    for step, rate in zip(steps, rates, strict=True):
        state = {
            name: tensor
            + 1e-3 * rate * (step - last) * (drift[name] + noise * torch.randn(tensor.shape, generator=generator))
            for name, tensor in state.items()
        }
        states[step], last = state, step
    return states


def gram_of(states: dict[int, State], tmp_path: Path) -> Gram:
    return measure(write_run(tmp_path, states).open())


def test_increments_are_the_norms_of_the_differences(tmp_path: Path) -> None:
    states = walk([1, 2, 1.5, 1], steps=[10, 20, 25, 40])
    measured = gram_of(states, tmp_path)
    for row, name in enumerate(measured.names):
        tensors = [state[name].double() for state in states.values()]
        expected = [float((later - earlier).norm()) for earlier, later in pairwise(tensors)]
        assert increments(measured.products)[row].tolist() == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_saved_twice_is_named_and_refused_before_anything_is_written(tmp_path: Path) -> None:
    states = walk([1] * 6, steps=[10, 20, 25, 40, 60, 75])
    states[25] = states[20]
    run = write_run(tmp_path, states)
    trajectory = run.open()
    request = Request(parse_method("relex"), 200, tmp_path / "out")
    with pytest.raises(DuplicateError, match="step 25 holds the same weights as that of step 20, bit for bit"):
        extrapolate(trajectory, [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1)
    assert not (tmp_path / "out").exists()
    inspected = inspect(run.run, run.base, grams=tmp_path / "grams", memory=64 * MIB, threads=1)
    assert [(each.kind, each.step) for each in inspected.findings if each.kind == "duplicate"] == [("duplicate", 25)]


def test_a_jump_is_named_with_its_step_and_the_tensor_that_led(tmp_path: Path) -> None:
    states = walk([1.0] * 20)
    for step in range(12, 21):
        states[step] = {**states[step], "mlp": states[step]["mlp"] + 0.05}
    (cells,) = jumps(gram_of(states, tmp_path))
    assert (cells.kind, cells.step, cells.tensor) == ("jump", 12, "mlp")
    assert "times as fast as they usually do, mlp most of all" in cells.text


@pytest.mark.parametrize(
    "rates",
    [
        [1.0] * 20,
        [min(1.0, (step + 1) / 10) for step in range(40)],
        [1.0 - step / 41 for step in range(40)],
        [1.0 if step % 3 else 2.5 for step in range(30)],
    ],
    ids=["constant", "warm-up", "decay", "uneven"],
)
def test_a_run_as_they_are_has_no_jump(rates: list[float], tmp_path: Path) -> None:
    assert jumps(gram_of(walk(rates), tmp_path)) == []


def test_irregular_saving_is_no_jump(tmp_path: Path) -> None:
    assert jumps(gram_of(walk([1.0] * 8, steps=[10, 20, 25, 40, 75, 76, 120, 200]), tmp_path)) == []


def test_of_few_checkpoints_no_jump_can_be_told(tmp_path: Path) -> None:
    assert jumps(gram_of(walk([1.0, 1.0, 1.0, 50.0]), tmp_path)) == []


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([10, 20, 30, 50, 60], [50]),
        ([10, 20, 30, 40, 70, 80], [70]),
        ([10, 20, 30, 40], []),
        ([10, 20, 25, 40, 75], []),
        ([10, 20, 50], []),
        ([8, 16, 24, 30], []),
    ],
)
def test_a_hole_is_a_gap_in_a_regular_sequence(steps: list[int], expected: list[int]) -> None:
    assert [each.step for each in holes(steps)] == expected


def test_how_many_are_missing_is_said() -> None:
    (result,) = holes([10, 20, 30, 40, 70])
    assert "between steps 40 and 70 checkpoints are missing (2 of them): the others are 10 steps apart" in result.text


def test_warnings_travel_with_the_prediction(tmp_path: Path) -> None:
    states = walk([1.0] * 5, steps=[10, 20, 30, 50, 60])
    trajectory = write_run(tmp_path, states).open()
    request = Request(parse_method("relex"), 200, tmp_path / "out")
    (made,) = extrapolate(trajectory, [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1)
    (warning,) = made.warnings
    assert warning.startswith("between steps 30 and 50 checkpoints are missing (1 of them)")
    assert manifest.read(tmp_path / "out").forecast == made


def test_a_clean_run_has_nothing_to_say(tmp_path: Path) -> None:
    measured = gram_of(walk([1.0] * 12), tmp_path)
    assert findings(measured) == []
    assert duplicates(measured) == []


def _lose(path: Path, name: str, start: int, stop: int) -> None:
    """Overwrite bytes `start` to `stop` of tensor `name` with zeros, as a lost page of a file reads."""
    weights = open_model(LocalDirectory(path), config={})
    with (path / SINGLE_FILE).open("r+b") as file:
        file.seek(weights.tensors[name].pieces[0].offset + start)
        file.write(bytes(stop - start))
    quiet(path)


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("mlp", 4096, 8192), ("mlp", 1024, 1536), ("mlp", 99_000, 101_001), ("norm", 0, 16)]
)
def test_a_part_of_a_file_that_was_lost_is_named_and_refused(tmp_path: Path, name: str, start: int, stop: int) -> None:
    run = write_run(tmp_path, drift({"mlp": (257, 301), "norm": (8,)}))
    _lose(run.run / "checkpoint-25", name, start, stop)
    with pytest.raises(
        CheckpointDamagedError, match=f"checkpoint-25: a stretch of {name} is all zeros at step 25, and the base has"
    ):
        measure(run.open())


@pytest.mark.parametrize("before", [0, 2, 4, 12, 500, 508, 510, 512])
def test_a_sector_that_is_lost_across_the_border_of_two_tensors_is_found(tmp_path: Path, before: int) -> None:
    states = drift({"embedding": (64, 512), "mlp": (64, 512)}, base=torch.bfloat16, stored=torch.bfloat16)
    run = write_run(tmp_path, states)
    weights = open_model(LocalDirectory(run.run / "checkpoint-25"), config={})
    first, second = (weights.tensors[name] for name in ("embedding", "mlp"))
    assert second.pieces[0].offset == first.pieces[0].offset + first.nbytes
    with (run.run / "checkpoint-25" / SINGLE_FILE).open("r+b") as file:
        file.seek(second.pieces[0].offset - before)
        file.write(bytes(512))
    quiet(run.run / "checkpoint-25")
    with pytest.raises(CheckpointDamagedError, match=r"checkpoint-25: a stretch of .* is all zeros at step 25"):
        measure(run.open())


def test_what_is_zero_in_the_base_too_was_not_lost(tmp_path: Path) -> None:
    states = drift({"embedding": (64, 512)})
    for state in states.values():
        state["embedding"][60:] = 0.0
        state["embedding"][7] *= torch.arange(512) % 2
    measure(write_run(tmp_path, states).open())


def test_a_base_that_the_run_was_not_started_from_is_pointed_out(tmp_path: Path) -> None:
    states = walk([1] * 4, steps=[10, 20, 25, 40])
    assert findings(gram_of(states, tmp_path / "right")) == []
    generator = torch.Generator().manual_seed(1)
    states[0] = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    reported = findings(gram_of(states, tmp_path / "wrong"))
    assert [(each.kind, each.step) for each in reported] == [("far", 10)]
    assert "step 10 is 1.3" in reported[0].text
    assert "Is this the base that the run was started from?" in reported[0].text


@pytest.mark.parametrize("moved", [0.0, 1e-4])
def test_weights_that_are_alike_in_all_models_do_not_hide_another_base(moved: float, tmp_path: Path) -> None:
    shapes = {"a.weight": (12, 10), "b.weight": (30, 7), "c.weight": (7, 30), "a.norm": (4000,), "b.norm": (4000,)}
    generator = torch.Generator().manual_seed(0)

    def model() -> State:
        return {
            name: torch.ones(shape) if "norm" in name else 0.3 * torch.randn(shape, generator=generator)
            for name, shape in shapes.items()
        }

    states = {0: model()}
    own = model()
    for step in (10, 20, 25, 40):
        moving = {name: tensor + moved * step * ("norm" in name) for name, tensor in own.items()}
        states[step] = moving | {"a.weight": own["a.weight"] * (1 + 1e-4 * step)}
    reported = findings(gram_of(states, tmp_path))
    assert [(each.kind, each.step) for each in reported] == [("far", 10)]


def trained(seed: int, *, steps: Sequence[int]) -> dict[int, State]:
    """Return a base and checkpoints of a small regression that Adam fits, its batches in the order of `seed`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 4))
    inputs = torch.randn(512, 16)
    targets = torch.randn(512, 4)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    states: dict[int, State] = {0: {name: tensor.clone() for name, tensor in model.state_dict().items()}}
    for step in range(1, max(steps) + 1):
        batch = torch.randint(0, 512, (8,), generator=generator)
        optimizer.zero_grad()
        torch.autograd.backward(torch.nn.functional.mse_loss(model(inputs[batch]), targets[batch]))
        optimizer.step()
        if step in steps:
            states[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return states


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_step_of_another_run_turns_back(place: int, tmp_path: Path) -> None:
    steps = [10, 20, 25, 40, 75]
    states = trained(1, steps=steps)
    assert foreign(gram_of(states, tmp_path / "own")) == []
    states[steps[place]] = trained(2, steps=steps)[steps[place]]
    (result,) = foreign(gram_of(states, tmp_path / "mixed"))
    assert str(steps[place]) in result.text.partition(":")[0]
    assert result.step in (steps[place], steps[place - 1])
    assert "as they do at a checkpoint of another run" in result.text
    assert foreign(gram_of({step: states[step] for step in [0, *steps[:4]]}, tmp_path / "four")) == []


def test_a_run_that_only_jitters_has_no_foreign_step(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(200, 20, generator=generator)}
    jitter = {s: {"w": base["w"] + 0.01 * torch.randn(200, 20, generator=generator)} for s in range(10, 110, 10)}
    assert foreign(gram_of({0: base, **jitter}, tmp_path)) == []


@pytest.mark.parametrize(
    ("steps", "same", "said"),
    [
        (
            (10, 20, 30, 40),
            (40, 20),
            r"of step 40 holds .* as that of step 20, .* rolled back\. Delete step 40, or, if it",
        ),
        ((10, 20, 30, 40, 50), (50, 20), "went on from there, steps 20 and 30 to 40"),
        ((10, 20, 30), (30, 20), r"nothing was trained in between\. Delete one of them"),
    ],
)
def test_a_run_that_was_rolled_back_is_seen(
    steps: tuple[int, ...], same: tuple[int, int], said: str, tmp_path: Path
) -> None:
    states = walk([1.0] * len(steps), steps=steps)
    states[same[0]] = states[same[1]]
    measured = gram_of(states, tmp_path)
    (duplicate,) = duplicates(measured)
    assert (duplicate.kind, duplicate.step) == ("duplicate", same[0])
    assert re.search(said, duplicate.text)
    with pytest.raises(DuplicateError, match="bit for bit"):
        refuse_duplicates(measured)
