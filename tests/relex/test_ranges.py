import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from relex import gram, kernel, ranges
from relex.errors import CheckpointChangedError, CheckpointError
from relex.gram import Gram
from relex.ranges import Range, measure_range
from relex.trajectory import Trajectory
from tests.helpers.trajectories import MIB, Run, drift, load, measure, write_model, write_run

STEPS = (10, 20, 25, 40, 75)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Several units, of a tensor that is multiplied by the loops in C and of some that are not."""
    shapes = {"a": (9,), "w": (1025, 1031), "z": (257, 301)}
    return write_run(tmp_path_factory.mktemp("large"), drift(shapes, steps=STEPS))


def _elsewhere(pieces: Sequence[Range]) -> Iterator[bytes]:
    """As workers do it, the last range first."""
    made = {piece: measure_range(piece) for piece in reversed(pieces)}
    assert len(made) > 2
    yield from (made[piece] for piece in pieces)


def _shared(trajectory: Trajectory, known: Gram | None = None) -> Gram:
    return gram.measure(trajectory, memory=64 * MIB, threads=2, known=known, share=_elsewhere)


def test_what_ranges_give_together_has_the_bits_of_one_process(large: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "RANGE_BYTES", MIB)
    trajectory = large.open()
    whole = measure(trajectory)
    for made in (_shared(trajectory), _shared(trajectory, known=whole.rows(range(2)))):
        assert torch.equal(made.products, whole.products)
        assert torch.equal(made.base_norms, whole.base_norms)
        assert made.digest == whole.digest
        assert made.contents is not None
        assert whole.contents is not None
        assert torch.equal(made.contents, whole.contents)


def _planned(run: Run) -> Range:
    kept: list[Range] = []

    def keep(pieces: Sequence[Range]) -> Iterator[bytes]:
        kept.extend(pieces)
        yield from map(measure_range, pieces)

    gram.measure(run.open(), memory=64 * MIB, threads=1, share=keep)
    return kept[0]


def test_a_worker_that_finds_other_files_refuses_in_one_line(large: Run, tmp_path: Path) -> None:
    shutil.copytree(large.base.parent, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path / "base", tmp_path / "run")
    planned = _planned(run)
    state = load(run.run / "checkpoint-25")
    state["a"] += 1
    write_model(run.run / "checkpoint-25", state)
    with pytest.raises(CheckpointChangedError, match="is not what it was when its range was planned") as caught:
        measure_range(planned)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not kernel.BUILT, reason="the loops in C were not built here")
def test_a_worker_that_is_installed_otherwise_refuses_in_one_line(large: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = _planned(large)
    monkeypatch.setattr(kernel, "BUILT", False)
    with pytest.raises(CheckpointError, match=r"takes products in fp64, and the others in fp32: .* is not built here"):
        measure_range(planned)
