"""A file that is written again with its size and time put back, after the Gram was taken from it, is noticed."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from safetensors.torch import load_file, save

from relex import gram
from relex.errors import CheckpointChangedError
from relex.extrapolation import Request, extrapolate
from relex.output.adapter import write_adapter
from relex.output.materialise import Output, materialise
from relex.output.shards import Shard, write_shard
from relex.predictors import parse_method
from relex.progress import Progress
from tests.helpers import peft_files
from tests.helpers.trajectories import MIB, Run, drift, measure, predict, tree, write_run

# Several units, one of a part of a chunk; and one that does not move.
SHAPES = {"embed": (1025, 1031), "layer.weight": (40, 25), "frozen": (10, 3)}


def overwritten(file: Path, name: str) -> None:
    """Change the last element of one tensor in place, and put the file's time back."""
    before = file.stat()
    tensors = load_file(file)
    tensors[name].view(-1)[-1] += 1
    with file.open("r+b") as writer:
        writer.write(save(tensors, metadata={"format": "pt"}))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size


def one_by_one(shards: Sequence[Shard], _: Progress | None) -> None:
    for shard in shards:
        write_shard(shard)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path / "in", drift(SHAPES))


@pytest.mark.parametrize("shared_out", [False, True], ids=["one process", "shards"])
@pytest.mark.parametrize("place", ["base", "run/checkpoint-20"])
@pytest.mark.parametrize("name", ["embed", "layer.weight"])
def test_a_prediction_is_not_made_of_products_and_weights_of_two_times(
    run: Run, tmp_path: Path, place: str, name: str, shared_out: bool
) -> None:
    kept, made = measure(run.open()), predict(run.open())
    overwritten(tmp_path / "in" / place / "model.safetensors", name)
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointChangedError, match=rf"{place}.*: {name} holds other bytes from element \d+ on than"):
        materialise(
            run.open(),
            [Output(made, tmp_path / "out" / "one")],
            contents=kept.contents,
            memory=64 * MIB,
            threads=2,
            spread=one_by_one if shared_out else None,
        )
    assert tree(tmp_path / "out") == set()


def test_what_never_moved_is_compared_too(run: Run, tmp_path: Path) -> None:
    kept, made = measure(run.open()), predict(run.open())
    overwritten(run.base / "model.safetensors", "frozen")
    with pytest.raises(CheckpointChangedError, match=r"base .*: frozen holds other bytes"):
        materialise(run.open(), [Output(made, tmp_path / "out")], contents=kept.contents, memory=64 * MIB, threads=1)


@pytest.mark.parametrize("form", ["adapter", "model"])
def test_an_adapter_that_was_written_again_is_noticed(tmp_path: Path, form: str) -> None:
    run = peft_files.write_run(tmp_path / "in")
    trajectory = run.open()
    kept, made = measure(trajectory), predict(trajectory)
    file = sorted(run.run.glob("*/adapter_model.safetensors"))[1]
    overwritten(file, next(name for name in load_file(file) if "lora_B" in name))

    def write() -> None:
        if form == "adapter":
            write_adapter(run.open(), made, tmp_path / "out", contents=kept.contents, memory=64 * MIB, threads=2)
        else:
            outputs = [Output(made, tmp_path / "out")]
            materialise(run.open(), outputs, contents=kept.contents, memory=64 * MIB, threads=2)

    with pytest.raises(CheckpointChangedError, match="holds other bytes from element 0 on than"):
        write()
    assert not (tmp_path / "out").exists()


def test_the_products_are_taken_afresh_the_next_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a store that keeps no time of the last change.
    monkeypatch.setattr(gram, "untouched", lambda now, was: True)
    request = Request(parse_method("relex"), 100, tmp_path / "out")

    def ask() -> None:
        extrapolate(run.open(), [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1)

    gram.cached(run.open(), tmp_path / "grams", memory=64 * MIB, threads=1)
    overwritten(run.run / "checkpoint-20" / "model.safetensors", "embed")
    with pytest.raises(CheckpointChangedError, match="Run again: the products are taken afresh"):
        ask()
    ask()
    assert (tmp_path / "out" / "relex.json").exists()
