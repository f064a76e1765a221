import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from relex import gram
from relex.errors import CheckpointChangedError, MemoryBudgetError, NonFiniteError
from relex.files.local import LocalDirectory
from relex.gram import Gram
from relex.layouts.hf import open_weights
from relex.layouts.weights import Weights
from relex.store import Checkpoint
from relex.streaming import UNIT
from relex.trajectory import Trajectory, open_trajectory
from tests.helpers.trajectories import (
    FROZEN,
    MIB,
    SHAPES,
    STEPS,
    Run,
    drift,
    least_memory,
    load,
    measure,
    tree,
    write_model,
    write_run,
)
from tests.relex.reference import dense


def _same(left: Gram, right: Gram) -> bool:
    return torch.equal(left.products, right.products) and left.digest == right.digest and left.steps == right.steps


def _first(trajectory: Trajectory, count: int) -> Trajectory:
    return open_trajectory(trajectory.base, trajectory.checkpoints[:count])


def _cached(trajectory: Trajectory, directory: Path) -> Gram:
    return gram.cached(trajectory, directory, memory=64 * MIB, threads=2)


def _refuse_to_read(done: int, total: int) -> None:
    raise AssertionError(f"{done} of {total} bytes were read")


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    """Thirty checkpoints: more than one tile of columns, and no multiple of the rows of a tile."""
    steps = tuple(step + step % 3 for step in range(4, 154, 5))
    states = drift({"w": (257, 131), "b": (7,), "s": ()}, steps=steps, base=torch.float32, stored=torch.float32)
    return write_run(tmp_path_factory.mktemp("long"), states).open()


@pytest.mark.parametrize(("base", "stored"), [("bfloat16", "bfloat16"), ("float32", "float16"), ("float64", "float64")])
def test_the_gram_is_that_of_the_dense_deltas(tmp_path: Path, base: str, stored: str) -> None:
    run = write_run(tmp_path, drift(base=getattr(torch, base), stored=getattr(torch, stored)))
    measured = measure(run.open())
    origin, checkpoints = load(run.base), [load(run.run / f"checkpoint-{step}") for step in STEPS]
    assert sorted(measured.names) == sorted(SHAPES)
    for place, name in enumerate(measured.names):
        D = dense.deltas(origin[name], [checkpoint[name] for checkpoint in checkpoints])
        # A delta is rounded to fp32 once, unless everything is fp64.
        np.testing.assert_allclose(measured.of(name), D @ D.T, rtol=1e-6, atol=1e-6 * np.abs(D @ D.T).max())
        assert float(measured.base_norms[place]) == pytest.approx(float((dense.wide(origin[name]) ** 2).sum()))


def test_a_tensor_longer_than_a_unit_has_every_product_once(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift({"w": (2 * UNIT + 12_345,)}, steps=(10, 25, 40)))
    measured = measure(run.open())
    origin, checkpoints = load(run.base), [load(run.run / f"checkpoint-{step}") for step in (10, 25, 40)]
    D = dense.deltas(origin["w"], [checkpoint["w"] for checkpoint in checkpoints])
    np.testing.assert_allclose(measured.of("w"), D @ D.T, rtol=1e-6, atol=1e-6 * np.abs(D @ D.T).max())
    assert measured.base_norms.item() == pytest.approx(float((dense.wide(origin["w"]) ** 2).sum()))


def test_a_shorter_window_is_part_of_a_longer_one_to_the_bit(long_run: Trajectory) -> None:
    whole = measure(long_run)
    for count in (2, 3, 4, 5, 8, 23, 24, 25, 29):
        assert _same(measure(_first(long_run, count)), whole.rows(range(count))), count


@pytest.mark.parametrize("known", [2, 3, 4, 7, 24, 25, 29])
def test_an_extended_gram_is_the_measured_one_to_the_bit(long_run: Trajectory, known: int) -> None:
    first = measure(_first(long_run, known))
    assert _same(gram.measure(long_run, memory=64 * MIB, threads=2, known=first), measure(long_run))


def test_a_saved_gram_serves_every_shorter_window_without_a_read(long_run: Trajectory, tmp_path: Path) -> None:
    whole = _cached(long_run, tmp_path)
    for count in (30, 25, 2):
        part = _first(long_run, count)
        result = gram.cached(part, tmp_path, memory=64 * MIB, threads=2, on_progress=_refuse_to_read)
        assert _same(result, whole.rows(range(count)))
        assert result.names == whole.names
        assert torch.equal(result.base_norms, whole.base_norms)
        assert result.identities == whole.identities[:count]


def test_a_saved_gram_is_extended_and_the_shorter_one_goes(long_run: Trajectory, tmp_path: Path) -> None:
    _cached(_first(long_run, 10), tmp_path)
    assert _same(_cached(long_run, tmp_path), measure(long_run))
    assert len(tree(tmp_path)) == 1


def test_the_gram_of_what_a_run_was_before_it_went_another_way_stays(run: Run, tmp_path: Path) -> None:
    before = run.open()
    _cached(before, tmp_path / "grams")
    state = load(run.run / "checkpoint-75")
    state["scale"] += 3
    write_model(run.run / "another" / "checkpoint-75", state)
    other = open_weights(LocalDirectory(run.run / "another" / "checkpoint-75"), base=before.base)
    _cached(open_trajectory(before.base, [*before.checkpoints[:-1], Checkpoint(75, other)]), tmp_path / "grams")
    gram.cached(before, tmp_path / "grams", memory=64 * MIB, threads=2, on_progress=_refuse_to_read)


def test_the_gram_of_another_base_is_not_taken_where_no_time_of_change_is_known(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Weights, "changes", ())
    _cached(run.open(), tmp_path / "grams")
    state = load(run.base)
    state["scale"] += 3
    write_model(tmp_path / "other", state)
    other = Run(tmp_path / "other", run.run).open()
    gram.forget(other, tmp_path / "grams")
    assert len(tree(tmp_path / "grams")) == 1
    assert _same(_cached(other, tmp_path / "grams"), measure(other))


def test_what_begins_later_is_measured_afresh_to_the_same_bits(long_run: Trajectory, tmp_path: Path) -> None:
    """The last bits of a product depend on its place in the tiles: taken from a longer Gram they would be others."""
    _cached(long_run, tmp_path)
    later = open_trajectory(long_run.base, long_run.checkpoints[3::2])
    assert _same(_cached(later, tmp_path), measure(later))


@pytest.mark.parametrize("where", ["base", "run/checkpoint-10", "run/checkpoint-40"])
def test_a_file_written_again_with_size_and_time_put_back_is_measured_again(
    run: Run, tmp_path: Path, where: str
) -> None:
    before = _cached(run.open(), tmp_path / "grams")
    _rewrite_behind_its_stat(tmp_path / where / "model.safetensors")
    after = _cached(run.open(), tmp_path / "grams")
    assert after.digest != before.digest
    assert _same(after, measure(run.open()))


@pytest.mark.parametrize("where", ["base", "run/checkpoint-40"])
def test_a_second_name_of_a_file_or_one_less_is_no_change(run: Run, tmp_path: Path, where: str) -> None:
    file, pin = tmp_path / where / "model.safetensors", tmp_path / "pinned"
    pin.hardlink_to(file)
    opened = run.open()
    before = _cached(opened, tmp_path / "grams")
    pin.unlink()
    opened.check_unchanged()
    opened = run.open()
    result = gram.cached(opened, tmp_path / "grams", memory=64 * MIB, threads=2, on_progress=_refuse_to_read)
    assert _same(result, before)
    pin.hardlink_to(file)
    opened.check_unchanged()


def test_an_extension_notices_that_the_known_part_is_about_other_bytes(run: Run, tmp_path: Path) -> None:
    _cached(run.open(window=40), tmp_path / "grams")
    _rewrite_behind_its_stat(run.run / "checkpoint-40" / "model.safetensors")
    assert _same(_cached(run.open(), tmp_path / "grams"), measure(run.open()))


def test_known_products_of_other_bytes_are_not_kept_where_no_stat_tells(run: Run) -> None:
    known = measure(run.open(window=40))
    _rewrite_behind_its_stat(run.run / "checkpoint-40" / "model.safetensors")
    assert _same(gram.measure(run.open(), memory=64 * MIB, threads=2, known=known), measure(run.open()))


def _rewrite_behind_its_stat(file: Path) -> None:
    stat = file.stat()
    # The clock of a file system ticks in hundredths of a second.
    while file.stat().st_ctime_ns == stat.st_ctime_ns:
        with file.open("r+b") as handle:
            handle.seek(-400, os.SEEK_END)
            handle.write(b"?" * 400)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert file.stat().st_mtime_ns == stat.st_mtime_ns


@pytest.mark.parametrize("changed", ["base", "run/checkpoint-10", "run/checkpoint-75"])
def test_a_changed_file_is_measured_again(run: Run, tmp_path: Path, changed: str) -> None:
    before = _cached(run.open(), tmp_path / "grams")
    state = load(tmp_path / changed)
    state["scale"] += 3
    write_model(tmp_path / changed, state)
    after = _cached(run.open(), tmp_path / "grams")
    assert _same(after, measure(run.open()))
    assert after.digest != before.digest


@pytest.mark.parametrize("content", [b"", b"junk", (1 << 60).to_bytes(8, "little") * 2])
def test_what_is_no_gram_in_the_directory_is_passed_over(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "grams").mkdir()
    (tmp_path / "grams" / "0.safetensors").write_bytes(content)
    write_model(tmp_path / "grams", {"w": torch.ones(3)})
    assert _same(_cached(run.open(), tmp_path / "grams"), measure(run.open()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("where", ["base", "run/checkpoint-25"])
def test_a_number_that_is_none_is_refused_by_tensor_and_step(
    run: Run, tmp_path: Path, where: str, value: float
) -> None:
    state = load(tmp_path / where)
    state["model.layers.0.mlp.weight"][-1, -1] = value
    write_model(tmp_path / where, state)
    message = f"{where}: model.layers.0.mlp.weight holds NaN or infinity" + (" at step 25" if "25" in where else r"\.")
    with pytest.raises(NonFiniteError, match=message) as caught:
        _cached(run.open(), tmp_path / "grams")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grams").exists()


def test_the_order_of_tensors_in_the_files_is_no_part_of_the_products(tmp_path: Path) -> None:
    states = drift()
    one = measure(write_run(tmp_path / "one", states).open())
    other = measure(write_run(tmp_path / "other", states, base_shards=4, shards=3).open())
    assert one.names != other.names
    for name in SHAPES:
        assert torch.equal(one.of(name), other.of(name))


def test_progress_counts_every_byte_once(run: Run) -> None:
    trajectory = run.open()
    seen: list[tuple[int, int]] = []
    gram.measure(trajectory, memory=64 * MIB, threads=2, on_progress=lambda done, total: seen.append((done, total)))
    stored = sum(tensor.nbytes for path in (run.base, *run.run.iterdir()) for tensor in load(path).values())
    assert seen[-1] == (stored, stored)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_budget_below_one_chunk_a_checkpoint_is_refused_with_one_that_will_do(run: Run) -> None:
    trajectory = run.open()
    least = least_memory(trajectory)
    needed = rf"--memory {least // MIB - 1} MiB is below the {least // MIB} MiB that one pass over 5 checkpoints needs"
    with pytest.raises(MemoryBudgetError, match=needed):
        gram.measure(trajectory, memory=least - MIB, threads=1)
    assert _same(gram.measure(trajectory, memory=least, threads=8), measure(trajectory))


def _cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def _rewrite(file: Path) -> None:
    with file.open("r+b") as handle:
        handle.seek(-2, os.SEEK_END)
        handle.write(b"\0\0")


def _replace(file: Path) -> None:
    copy = file.with_suffix(".new")
    copy.write_bytes(file.read_bytes())
    copy.replace(file)


@pytest.mark.parametrize("where", ["base", "run/checkpoint-25"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "ended at byte .* inside tensor .*: it was cut while being read"),
        (_rewrite, "changed while it was read .*mtime"),
        (_replace, "changed while it was read .*version"),
        (Path.unlink, "was removed while it was read"),
    ],
)
def test_a_file_that_changes_while_it_is_read_is_noticed(
    tmp_path: Path, where: str, damage: Callable[[Path], None], message: str
) -> None:
    # Enough tensors that the pass is still going on after the first of them is reported.
    run = write_run(tmp_path, drift({f"w{place:02}": (50,) for place in range(40)}))
    damaged = False

    def on_progress(done: int, total: int) -> None:
        nonlocal damaged
        if not damaged:
            damaged = True
            damage(tmp_path / where / "model.safetensors")

    with pytest.raises(CheckpointChangedError, match=f"{where}/model.safetensors {message}") as caught:
        gram.cached(run.open(), tmp_path / "grams", memory=64 * MIB, threads=2, on_progress=on_progress)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "grams").exists()


def test_a_frozen_tensor_has_a_zero_gram(run: Run) -> None:
    assert not measure(run.open()).of(FROZEN).any()
