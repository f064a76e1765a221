import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from relex import store
from relex.errors import CheckpointIncompleteError, StoreError
from relex.store import State, StoredCheckpoint
from tests.helpers.trajectories import FROZEN, STEPS, Run, drift, load, quiet, write_model, write_run


def _scan(run: Run, *, now: float | None = None) -> dict[int, StoredCheckpoint]:
    checkpoints = store.scan(run.run, store.open_base(run.base), now=time.time() if now is None else now)
    return {each.step: each for each in checkpoints}


def _observed(run: Run, *, window: int | None = None) -> tuple[int, ...]:
    stored = tuple(_scan(run).values())
    return tuple(checkpoint.step for checkpoint in store.observed(stored, run.run, window=window))


def _rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load(path)
    change(state)
    write_model(path, state)


def test_quiet_checkpoints_are_ready_by_ascending_step(run: Run) -> None:
    checkpoints = _scan(run)
    assert tuple(checkpoints) == STEPS
    assert {each.state for each in checkpoints.values()} == {State.READY}
    assert all(each.weights is not None and each.reason == "" for each in checkpoints.values())


def test_steps_are_numbers_and_not_names(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift(steps=(9, 100, 20)))
    assert tuple(_scan(run)) == (9, 20, 100)


def test_names_that_are_not_exactly_a_step_are_not_looked_at(run: Run) -> None:
    for name in (
        "tmp-checkpoint-5", "checkpoint-5.tmp", ".checkpoint-5", "old_step_5", "step_5.old", "tmp_step_5", "step_",
        "checkpoint-5 ", "Checkpoint-5", "checkpoint--5", "5", "global_step_5_hf",
    ):  # fmt: skip
        write_model(run.run / name, {"other": torch.ones(1)})
    (run.run / "checkpoint-6").write_text("a file")
    assert tuple(_scan(run)) == STEPS


@pytest.mark.parametrize("name", ["step_7", "global_step_7", "global_step7", "checkpoint-7", "step_007"])
def test_plain_step_directories_are_checkpoints(run: Run, name: str) -> None:
    for step in STEPS:
        shutil.rmtree(run.run / f"checkpoint-{step}")
    write_model(run.run / name, drift()[10])
    assert _scan(run)[7].state is State.READY


def test_two_directories_for_one_step_are_broken_and_no_other_step(run: Run) -> None:
    write_model(run.run / "step_25", drift()[25])
    checkpoints = _scan(run)
    assert [step for step, each in checkpoints.items() if each.state is State.READY] == [10, 20, 40, 75]
    assert (checkpoints[25].state, checkpoints[25].reason) == (
        State.BROKEN,
        f"{run.run} has 2 directories for step 25: checkpoint-25 and step_25. Keep one.",
    )
    with pytest.raises(CheckpointIncompleteError, match=r"step 25 is broken: .* has 2 directories for step 25"):
        _observed(run)


@pytest.mark.parametrize(
    ("name", "step"), [("step_50", 50), ("hf_49", 50), ("global_step_80", 80), ("iter_0000005", 5)]
)
def test_a_step_of_another_trainer_is_never_mixed_in(run: Run, name: str, step: int) -> None:
    write_model(run.run / name, drift()[25])
    checkpoints = _scan(run)
    assert [step for step, each in checkpoints.items() if each.state is State.READY] == list(STEPS)
    assert checkpoints[step].state is State.BROKEN
    assert checkpoints[step].reason.startswith(
        f"{run.run}: {name} lies beside checkpoint-10, which another trainer names so"
    )
    assert step < 40 or _observed(run, window=40) == STEPS[:4]
    with pytest.raises(CheckpointIncompleteError, match=f"step {step} is broken: .*two runs"):
        _observed(run)


def test_of_two_trainers_as_many_nobody_can_tell(run: Run) -> None:
    for step in STEPS:
        write_model(run.run / f"step_{step + 1}", drift()[25])
    assert {each.state for each in _scan(run).values()} == {State.BROKEN}


def test_digits_of_another_script_are_no_step(run: Run) -> None:
    write_model(run.run / "checkpoint-\u0663", drift()[25])
    checkpoints = _scan(run)
    assert checkpoints[3].state is State.BROKEN
    assert "'checkpoint-\\u0663' is no name that a trainer gives" in checkpoints[3].reason
    with pytest.raises(CheckpointIncompleteError, match="step 3 is broken"):
        _observed(run)


@pytest.mark.parametrize("said", [30, 7, 0])
def test_a_directory_whose_trainer_was_at_another_step_is_refused(run: Run, said: int) -> None:
    path = run.run / "checkpoint-20"
    (path / "trainer_state.json").write_text(json.dumps({"global_step": said}))
    quiet(path)
    result = _scan(run)[20]
    assert result.state is State.BROKEN
    assert f"{path} is step 20 by its name, and trainer_state.json in it says {said}" in result.reason
    (path / "trainer_state.json").write_text(json.dumps({"global_step": 20}))
    assert _scan(run)[20].state is State.READY


def test_without_a_marker_a_checkpoint_is_complete_after_thirty_quiet_seconds(run: Run) -> None:
    path = run.run / "checkpoint-75"
    written = (path / "model.safetensors").stat().st_mtime
    early, late = _scan(run, now=written + 29.5)[75], _scan(run, now=written + 30.5)[75]
    assert (early.state, late.state) == (State.NOT_YET, State.READY)
    assert "has no trainer_state.json and changed" in early.reason
    assert early.weights is None


def test_with_its_marker_a_checkpoint_is_complete_at_once(run: Run) -> None:
    path = quiet(run.run / "checkpoint-75", seconds=1.0)
    (path / "trainer_state.json").write_text("{}")
    assert _scan(run)[75].state is State.READY


def test_a_marker_that_is_half_written_is_waited_for(run: Run) -> None:
    path = run.run / "checkpoint-75"
    (path / "trainer_state.json").write_text('{"global_step": 7')
    result = _scan(run)[75]
    assert result.state is State.NOT_YET
    assert "trainer_state.json" in result.reason
    assert "does not parse" in result.reason


def test_a_marker_older_than_the_weights_belongs_to_an_earlier_save(run: Run) -> None:
    path = run.run / "checkpoint-75"
    (path / "trainer_state.json").write_text("{}")
    os.utime(path / "model.safetensors")
    os.utime(path / "trainer_state.json", (0, 0))
    result = _scan(run)[75]
    assert result.state is State.NOT_YET
    assert "weights are newer than trainer_state.json" in result.reason


def test_a_checkpoint_that_says_it_is_incomplete_is_believed(run: Run) -> None:
    (run.run / "checkpoint-75" / "checkpoint-is-incomplete.txt").write_text("")
    assert "holds checkpoint-is-incomplete.txt" in _scan(run)[75].reason


def test_a_hole_is_a_part_that_has_not_arrived(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift({"w": (1 << 16,)}, base=torch.float32, stored=torch.float32))
    file = run.run / "checkpoint-75" / "model.safetensors"
    size = file.stat().st_size
    os.truncate(file, 4096 * 2)
    os.truncate(file, size)
    quiet(file.parent)
    result = _scan(run)[75]
    assert result.state is State.BROKEN
    assert f"has a hole at byte 8192 of {size}" in result.reason


def test_what_is_wrong_in_a_quiet_directory_is_broken_and_in_a_fresh_one_not_yet(run: Run) -> None:
    file = run.run / "checkpoint-75" / "model.safetensors"
    os.truncate(file, 100)
    written = file.stat().st_mtime
    assert _scan(run, now=written + 1)[75].state is State.NOT_YET
    assert _scan(run, now=written + 31)[75].state is State.BROKEN


def test_an_empty_directory_is_not_a_checkpoint_yet(run: Run) -> None:
    (run.run / "checkpoint-80").mkdir()
    result = _scan(run)[80]
    assert result.state is State.NOT_YET
    assert "has neither model.safetensors nor model.safetensors.index.json" in result.reason


def test_a_link_to_nothing_is_broken_and_no_crash(run: Run) -> None:
    path = run.run / "checkpoint-75"
    (path / "model.safetensors").unlink()
    (path / "model.safetensors").symlink_to(path / "pruned-blob")
    os.utime(path / "model.safetensors", (0, 0), follow_symlinks=False)
    os.utime(path, (0, 0))
    assert _scan(run)[75].state is State.BROKEN


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("scale"),
            r"checkpoint-40 has no tensor scale, which the base .*base has with shape \[\]",
        ),
        (
            lambda state: state.update(extra=torch.ones(3)),
            r"has tensor extra with shape \[3\], which the base .* not have",
        ),
        (
            lambda state: state.update({FROZEN: torch.ones(5, 16, dtype=torch.bfloat16)}),
            r"frozen.weight has shape \[5, 16\], the base .*base has \[16, 5\]",
        ),
        (
            lambda state: state.update({FROZEN: torch.ones(16, 5, dtype=torch.int32)}),
            r"frozen.weight is torch.int32, the base .*base has torch.bfloat16",
        ),
    ],
    ids=["missing", "extra", "shape", "kind"],
)
def test_a_checkpoint_of_another_model_is_broken_and_never_left_out(
    run: Run, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    _rewrite(run.run / "checkpoint-40", change)
    assert _scan(run)[40].state is State.BROKEN
    with pytest.raises(CheckpointIncompleteError, match=f"step 40 is broken: .*{message}"):
        _observed(run)


def test_what_is_broken_beyond_the_window_does_not_matter(run: Run) -> None:
    os.truncate(run.run / "checkpoint-75" / "model.safetensors", 100)
    assert _observed(run, window=40) == (10, 20, 25, 40)


def test_a_window_holds_the_steps_up_to_and_including_it(run: Run) -> None:
    assert _observed(run, window=25) == (10, 20, 25)
    assert _observed(run, window=24) == (10, 20)


def test_a_run_without_checkpoints_says_what_it_looked_for(tmp_path: Path) -> None:
    run = write_run(tmp_path, {0: drift()[0]})
    with pytest.raises(StoreError, match="has no checkpoints: no directory in it is named checkpoint-N"):
        _observed(run)


def test_one_checkpoint_is_no_line(run: Run) -> None:
    with pytest.raises(StoreError, match=r"has 1 checkpoint at or before step 19, .*10.*75.*; a line needs 2"):
        _observed(run, window=19)


def test_a_run_that_is_no_directory_is_refused(run: Run) -> None:
    with pytest.raises(StoreError, match="nowhere is not a directory"):
        store.scan(run.run / "nowhere", store.open_base(run.base), now=0.0)


def test_a_base_must_be_a_model_directory(run: Run) -> None:
    with pytest.raises(CheckpointIncompleteError, match="nowhere is not a directory"):
        store.open_base(run.base / "nowhere")
    (run.base / "config.json").unlink()
    with pytest.raises(CheckpointIncompleteError, match=r"has no config.json"):
        store.open_base(run.base)


def test_a_checkpoint_without_its_own_config_is_read_by_the_base_one(tmp_path: Path) -> None:
    states = drift({"model.embed_tokens.weight": (23, 8)})
    states[40]["lm_head.weight"] = states[40]["model.embed_tokens.weight"].clone()
    run = write_run(tmp_path, states, config={"tie_word_embeddings": True})
    (run.run / "checkpoint-40" / "config.json").unlink()
    quiet(run.run / "checkpoint-40")
    assert _scan(run)[40].state is State.READY


def test_a_rewritten_file_is_looked_at_again(run: Run) -> None:
    path = run.run / "checkpoint-75"
    assert _scan(run)[75].state is State.READY
    save_file({"other": torch.ones(1)}, path / "model.safetensors")
    quiet(path)
    assert _scan(run)[75].state is State.BROKEN


def test_a_config_that_is_half_written_is_waited_for(run: Run) -> None:
    path = run.run / "checkpoint-75"
    (path / "config.json").write_text(json.dumps({"a": 1})[:-1])
    assert _scan(run)[75].state is State.NOT_YET


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_base_with_links_in_a_circle_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, drift())
    (run.base / name).unlink()
    (run.base / name).symlink_to(name)
    with pytest.raises(CheckpointIncompleteError, match=r"^base \S+(: | has no )\S+") as caught:
        store.open_base(run.base)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_broadcasts_of_prime_rl_are_read_from_the_first_step_on(tmp_path: Path) -> None:
    states = drift(steps=(1, 2, 5))
    run = write_run(tmp_path, states)
    for step in (0, 1, 2, 5):
        place = run.run / f"step_{step}"
        if step:
            (run.run / f"checkpoint-{step}").rename(place)
            (place / "config.json").unlink()
        else:
            write_model(place, states[0])
        (place / "tmp-rank1.safetensors").write_bytes(b"half")
        (place / "STABLE").touch()
        # Just written: the marker alone says that it is whole.
        for file in place.iterdir():
            os.utime(file)
        os.utime(place / "STABLE")
    assert _observed(run) == (1, 2, 5)
    os.utime(run.run / "step_5" / "model.safetensors", (time.time() + 1, time.time() + 1))
    assert "weights are newer than STABLE" in _scan(run)[5].reason


def test_a_marker_without_weights_says_how_prime_rl_writes_them(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift())
    (run.run / "step_10").mkdir()
    (run.run / "step_10" / "STABLE").touch()
    for step in STEPS:
        shutil.rmtree(run.run / f"checkpoint-{step}")
    assert 'Set weight_broadcast.type to "filesystem"' in _scan(run)[10].reason
