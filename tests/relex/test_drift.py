"""A prediction against the checkpoint that came later, read from model directories alone."""

import shutil
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from relex import distance
from relex.drift import Drift, drift, write_as_predicted
from relex.errors import MemoryBudgetError, NonFiniteError, OutputError
from relex.extrapolation import Request, extrapolate
from relex.output.manifest import read, with_vectors
from relex.predictors import parse_method
from relex.store import Checkpoint, open_base, scan
from tests.helpers import peft_files, trajectories
from tests.helpers.trajectories import MIB, Run, load, write_model, write_run

WINDOW, LATER = 40, 75


def predict(run: Run, root: Path, method: str = "relex-pinned:damping=0.6") -> tuple[Path, Path]:
    """Write the copy of the last observed checkpoint and a prediction of the later one."""
    requests = [
        Request(parse_method("hold"), WINDOW, root / "observed"),
        Request(parse_method(method), LATER, root / "predicted"),
    ]
    extrapolate(run.open(window=WINDOW), requests, grams=root / "grams", memory=64 * MIB, threads=2)
    return requests[0].directory, requests[1].directory


def real(run: Run, step: int = LATER) -> Checkpoint:
    stored = scan(run.run, open_base(run.base), now=time.time())
    return next(
        Checkpoint(checkpoint.step, checkpoint.weights)
        for checkpoint in stored
        if checkpoint.step == step and checkpoint.weights
    )


def compare(run: Run, observed: Path, predicted: Path, *, memory: int = 64 * MIB, threads: int = 2) -> Drift:
    base = open_base(run.base)
    return drift(base, real(run), predicted=predicted, observed=observed, memory=memory, threads=threads)


def flat(model: Path) -> Tensor:
    return torch.cat([tensor.double().flatten() for _, tensor in sorted(load(model).items())])


def prune(run: Run) -> None:
    for directory in run.run.iterdir():
        if not directory.name.endswith(f"-{LATER}"):
            shutil.rmtree(directory)


@pytest.mark.parametrize("method", ["relex-pinned:damping=0.6", "alpha-rl"])
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_the_gram_of_all_checkpoints_says_but_for_the_rounding_of_the_output(
    tmp_path: Path, method: str, base: torch.dtype, stored: torch.dtype
) -> None:
    run = write_run(tmp_path, trajectories.drift(base=base, stored=stored))
    observed, predicted = predict(run, tmp_path, method)
    both, forecast = run.open(), with_vectors(read(predicted).forecast, predicted)
    added = distance.along(both, forecast, LATER, memory=64 * MIB, threads=1)
    expected = distance.distance(trajectories.measure(both), forecast, LATER, added=added)
    assert expected is not None
    assert expected.skill is not None
    prune(run)
    measured = compare(run, observed, predicted)
    assert measured.skill == pytest.approx(expected.skill, abs=0.01)
    assert measured.cosine == pytest.approx(expected.cosine, abs=0.001)
    assert measured.norm_ratio == pytest.approx(expected.norm_ratio, abs=0.001)
    assert (measured.rounding > 0) == (torch.finfo(base).eps > torch.finfo(stored).eps)
    assert measured.norm_band == forecast.norm_band


def test_a_base_that_is_finer_than_its_checkpoints_puts_no_rounding_into_the_deltas(tmp_path: Path) -> None:
    states = trajectories.drift(base=torch.float32, stored=torch.bfloat16)
    for state in states.values():
        for name in trajectories.SHAPES:
            # Deltas of the size of the rounding.
            state[name] = (states[0][name] + 0.01 * (state[name].float() - states[0][name])).to(state[name].dtype)
    run = write_run(tmp_path, states)
    observed, predicted = predict(run, tmp_path)
    expected = distance.distance(trajectories.measure(run.open()), read(predicted).forecast, LATER)
    assert expected is not None
    measured = compare(run, observed, predicted)
    assert measured.skill == pytest.approx(expected.skill, abs=1e-3)
    assert measured.cosine == pytest.approx(expected.cosine, abs=1e-3)
    assert measured.norm_ratio == pytest.approx(expected.norm_ratio, abs=1e-3)


def test_the_copy_itself_has_no_skill_and_the_real_checkpoint_all_of_it(tmp_path: Path) -> None:
    run = write_run(tmp_path, trajectories.drift())
    observed, predicted = predict(run, tmp_path)
    assert compare(run, observed, observed).skill == 0.0
    # In place of the prediction, what it predicts.
    shutil.copy(run.run / f"checkpoint-{LATER}" / "model.safetensors", predicted)
    measured = compare(run, observed, predicted)
    assert measured.skill == 1.0
    assert measured.cosine == pytest.approx(1.0)
    assert measured.norm_ratio == 1.0


def test_a_run_that_stands_still_says_nothing_of_skill(tmp_path: Path) -> None:
    states = trajectories.drift()
    run = write_run(tmp_path, states)
    observed, predicted = predict(run, tmp_path)
    write_model(run.run / f"checkpoint-{LATER}", states[WINDOW])
    measured = compare(run, observed, predicted)
    assert measured.skill is None
    assert measured.norm_ratio is not None


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_are_compared_as_the_whole_models_they_make(tmp_path: Path, dora: bool) -> None:
    run = peft_files.write_run(tmp_path, dora=dora, dtype=torch.bfloat16)
    merged = peft_files.write_merged(run, tmp_path / "merged")
    observed, predicted = predict(run, tmp_path)
    before = read(predicted).forecast
    prune(run)
    measured = compare(run, observed, predicted)
    later = flat(merged.run / f"checkpoint-{LATER}")
    waited, missed = (torch.linalg.norm(flat(path) - later) for path in (observed, predicted))
    assert measured.skill == pytest.approx(1.0 - float(missed / waited) ** 2, abs=1e-3)
    assert measured.norm == pytest.approx(float(torch.linalg.norm(later - flat(run.base))), rel=1e-3)
    assert measured.norm_band == before.norm_band


def test_memory_and_threads_do_not_change_a_digit_and_too_little_memory_is_told(tmp_path: Path) -> None:
    run = write_run(tmp_path, trajectories.drift(base=torch.float32))
    observed, predicted = predict(run, tmp_path)
    with pytest.raises(MemoryBudgetError) as caught:
        compare(run, observed, predicted, memory=MIB)
    least = int(str(caught.value).split("Give at least ")[1].removesuffix("MiB.")) * MIB
    measured = compare(run, observed, predicted, memory=least, threads=1)
    assert measured == compare(run, observed, predicted, threads=5)


def test_a_run_that_diverged_is_told_with_the_tensor_and_the_step(tmp_path: Path) -> None:
    states = trajectories.drift()
    run = write_run(tmp_path, states)
    observed, predicted = predict(run, tmp_path)
    states[LATER]["lm_head.weight"][3, 2] = float("nan")
    write_model(run.run / f"checkpoint-{LATER}", states[LATER])
    with pytest.raises(NonFiniteError, match=r"lm_head.weight holds NaN or infinity at step 75"):
        compare(run, observed, predicted)


def test_a_directory_that_is_no_prediction_is_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path, trajectories.drift())
    observed, _ = predict(run, tmp_path)
    with pytest.raises(OutputError, match=r"relex\.json"):
        compare(run, observed, run.base)


def test_a_real_checkpoint_is_written_as_predictions_are_though_it_is_alone(tmp_path: Path) -> None:
    states = trajectories.drift(stored=torch.float32)
    run = write_run(tmp_path, states)
    run.base.joinpath("tokenizer.json").write_text("{}")
    prune(run)
    for _ in range(2):  # the second call finds it there
        write_as_predicted(open_base(run.base), real(run), tmp_path / "copy", memory=64 * MIB, threads=1)
    copy = load(tmp_path / "copy")
    assert all(torch.equal(copy[name], states[LATER][name].to(states[0][name].dtype)) for name in states[0])
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
