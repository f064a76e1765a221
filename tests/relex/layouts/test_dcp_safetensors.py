"""Shards of NeMo-RL's kind: whatever is missing or left over, the base's shapes show it."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from relex import store
from relex.errors import CheckpointDamagedError, CheckpointIncompleteError, CheckpointMismatchError
from relex.files.local import LocalDirectory
from relex.layouts.detection import open_any
from relex.layouts.weights import Weights
from relex.store import State
from tests.helpers.dcp_files import save, write_dcp_safetensors_run
from tests.helpers.random_faults import measure, states
from tests.helpers.trajectories import Run, content, predict, quiet, write, write_model, write_run

NORM = "model.layers.0.input_layernorm.weight"


def shard(rank: int) -> str:
    return f"shard-{rank:05}-model-00001-of-00001.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run like NeMo-RL's of two ranks, to be damaged at will."""
    return write_dcp_safetensors_run(tmp_path, states())


def _place(run: Run, step: int = 25) -> Path:
    return run.run / f"step_{step}" / "policy" / "weights" / "model"


def _open(run: Run, step: int = 25) -> Weights:
    return open_any(LocalDirectory(run.run / f"step_{step}"), base=store.open_base(run.base))


def _say(file: Path, text: str) -> None:
    """Write one shard anew with another account of where its parts lie."""
    save_file(load_file(file), file, metadata={"DCP_SHARDING_INFO": text})
    quiet(file.parent)


def _place_head(file: Path, change: Callable[[list[int]], object]) -> None:
    """Say of a shard's part of the output head that it begins at what `change` makes of its origin."""
    with safe_open(file, framework="pt") as handle:
        said = json.loads(handle.metadata()["DCP_SHARDING_INFO"])
    head = said["lm_head.weight"]
    head["saved_offsets"] = change(head["saved_offsets"])
    _say(file, json.dumps(said))


def _save(path: Path, state: dict[str, Tensor], *, world: int) -> None:
    save(state, HuggingFaceStorageWriter(str(path), save_distributed=True), world=world)


def test_a_prediction_from_shards_is_the_prediction_from_whole_models(run: Run, tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", states())
    made = [content(write(r.open(), predict(r.open()), tmp_path / r.run.parent.name / "out")) for r in (run, whole)]
    assert made[0] == made[1]


@pytest.mark.parametrize("world", [1, 5, 70])
def test_any_number_of_ranks_reads_the_same(tmp_path: Path, world: int) -> None:
    state = dict(states()[10])
    _save(tmp_path / "c", state, world=world)
    weights = open_any(LocalDirectory(tmp_path / "c"), base=store.open_base(write_model(tmp_path / "base", state)))
    assert weights.layout == "dcp_safetensors"
    for name, tensor in state.items():
        buffer = bytearray(weights.tensors[name].nbytes)
        weights.read_into(weights.tensors[name], 0, memoryview(buffer))
        assert bytes(buffer) == tensor.contiguous().numpy().tobytes(), name


def test_without_the_last_rank_the_tensors_are_smaller_and_both_shapes_are_shown(run: Run) -> None:
    (_place(run) / shard(2)).unlink()
    # The base without what only the second rank held: nothing but the shapes can tell.
    write_model(run.base, {k: v for k, v in load_file(run.base / "model.safetensors").items() if k != NORM})
    with pytest.raises(
        CheckpointIncompleteError, match=r"up to \[12, 8\], the base .* has \[23, 8\]\. The files of a ra"
    ):
        _open(run)


def test_without_the_first_rank_the_shape_is_right_and_the_elements_are_missing(run: Run) -> None:
    (_place(run) / shard(1)).unlink()
    with pytest.raises(
        CheckpointMismatchError, match=r"1 pieces of .* hold 88 elements, and its shape \[23, 8\] has 184"
    ):
        _open(run)


def test_without_the_rank_that_held_a_replicated_tensor_it_is_named(run: Run) -> None:
    (_place(run) / shard(2)).unlink()
    with pytest.raises(
        CheckpointIncompleteError, match=rf"none of the 1 shards holds {NORM}, which the base .* has .*\[8\]"
    ):
        _open(run)


def test_a_missing_rank_is_seen_in_the_store(run: Run) -> None:
    (_place(run, 75) / shard(2)).unlink()
    quiet(_place(run, 75))
    base = store.open_base(run.base)
    stored = store.scan(run.run, base, now=time.time())
    assert [checkpoint.state for checkpoint in stored] == [State.READY] * 4 + [State.BROKEN]


@pytest.mark.parametrize("leftover", [3, 4])
def test_files_of_a_larger_world_that_were_left_over_are_refused(run: Run, tmp_path: Path, leftover: int) -> None:
    _save(tmp_path / "larger", dict(states()[25]), world=4)
    (tmp_path / "larger" / shard(leftover)).rename(_place(run) / shard(leftover))
    with pytest.raises(CheckpointMismatchError, match=r"A rank's files are missing or left over"):
        _open(run)


def test_a_shard_in_another_precision_is_left_over(run: Run, tmp_path: Path) -> None:
    _save(tmp_path / "rounded", {name: tensor.bfloat16() for name, tensor in states()[25].items()}, world=2)
    (tmp_path / "rounded" / shard(2)).replace(_place(run) / shard(2))
    with pytest.raises(CheckpointMismatchError, match=r"torch\.bfloat16 of 2 dimensions .* torch\.float32 of 2"):
        _open(run)


@pytest.mark.parametrize("said", ["{", "[]", "{}", '{"lm_head.weight": {}}', "[" * 100_000])
def test_a_shard_that_does_not_say_where_its_parts_lie_is_refused(run: Run, said: str) -> None:
    _say(_place(run) / shard(1), said)
    with pytest.raises(CheckpointMismatchError, match=r"does not say where in the whole tensors its parts lie"):
        _open(run)


@pytest.mark.parametrize("origin", [7, [0], [0, 0, 0], [0, "0"], [0, 0.0], [0, None], None])
def test_a_part_without_a_place_of_its_own_is_refused(run: Run, origin: object) -> None:
    _place_head(_place(run) / shard(1), lambda _: origin)
    with pytest.raises(CheckpointMismatchError, match=r"lm_head\.weight of shape \[12, 8\] begins at"):
        _open(run)


@pytest.mark.parametrize("first", [-1, 1, 1 << 60])
def test_a_part_that_is_said_to_lie_elsewhere_is_refused(run: Run, first: int) -> None:
    _place_head(_place(run) / shard(2), lambda origin: [first, *origin[1:]])
    with pytest.raises((CheckpointIncompleteError, CheckpointMismatchError), match=r"lm_head\.weight"):
        _open(run)


def test_a_tensor_that_the_base_lacks_is_not_skipped(run: Run) -> None:
    smaller = {k: v for k, v in load_file(run.base / "model.safetensors").items() if "mlp" not in k}
    base = store.open_base(write_model(run.base, smaller))
    (checkpoint, *_) = store.scan(run.run, base, now=time.time())
    assert "has tensor model.layers.0.mlp.down_proj.weight" in checkpoint.reason


@pytest.mark.parametrize("lost", [16, 60, 104, 400])
@pytest.mark.parametrize("rank", [1, 2])
def test_an_end_of_a_shard_that_did_not_arrive_is_seen_in_the_middle_of_a_tensor(
    run: Run, rank: int, lost: int
) -> None:
    file = _place(run) / shard(rank)
    size = file.stat().st_size
    os.truncate(file, size - lost)
    os.truncate(file, size)
    quiet(file.parent)
    with pytest.raises(CheckpointDamagedError, match=r"a stretch of .* is all zeros at step 25"):
        measure(run)


def test_it_is_ready_when_it_has_been_quiet(run: Run) -> None:
    base = store.open_base(run.base)
    quiet(_place(run), seconds=5)
    (_, _, checkpoint, *_) = store.scan(run.run, base, now=time.time())
    assert checkpoint.state is State.NOT_YET
    assert "5 s ago" in checkpoint.reason


def test_a_sharded_scalar_and_integers_are_read(tmp_path: Path) -> None:
    state = {"scale": torch.tensor(3.5), "ids": torch.arange(7), "w": torch.randn(5, 3, 2)}
    _save(tmp_path / "c", state, world=2)
    weights = open_any(LocalDirectory(tmp_path / "c"), base=store.open_base(write_model(tmp_path / "base", state)))
    assert {name: entry.shape for name, entry in weights.tensors.items()} == {"scale": (), "ids": (7,), "w": (5, 3, 2)}
