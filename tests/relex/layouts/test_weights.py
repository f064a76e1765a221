import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from relex.errors import CheckpointError, CheckpointIncompleteError, CheckpointMismatchError, RelexError
from relex.files.local import LocalDirectory
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE, open_model
from relex.layouts.weights import Piece, Weights, tiled
from relex.trajectory import open_trajectory
from tests.helpers.trajectories import Run, drift, load, predict, write, write_model, write_run

WHOLE = save(
    {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(5, dtype=torch.bfloat16)}, metadata={"format": "pt"}
)
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")


def _weights(path: Path) -> Weights:
    return open_model(LocalDirectory(path), config={})


def _open(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / SINGLE_FILE).write_bytes(content)
        _weights(Path(directory))


@given(st.integers(0, len(WHOLE) - 1))
@settings(deadline=None, max_examples=60)
def test_a_file_cut_at_any_byte_is_incomplete(size: int) -> None:
    with pytest.raises(CheckpointIncompleteError, match=rf"\({size} bytes\) is not a whole safetensors file: .*wait"):
        _open(WHOLE[:size])


def test_a_file_with_bytes_after_its_end_is_incomplete() -> None:
    with pytest.raises(CheckpointIncompleteError, match="not a whole safetensors file"):
        _open(WHOLE + b"\0")


@given(st.integers(0, HEADER - 1), st.integers(1, 255))
@settings(deadline=None, max_examples=150)
def test_a_damaged_header_is_refused_in_words_or_does_no_harm(position: int, flip: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[position] ^= flip
    try:
        _open(bytes(damaged))
    except RelexError as error:
        assert "\n" not in str(error)  # noqa: PT017 - it may also open


@pytest.mark.parametrize(
    "boxes",
    [
        [((0, 0), (2, 4)), ((1, 0), (2, 4))],
        [((0, 0), (2, 4)), ((0, 0), (2, 4))],
        [((0, 0), (4, 2)), ((0, 1), (4, 2))],
        [((0, 0), (2, 2)), ((0, 2), (2, 2)), ((1, 1), (2, 2)), ((3, 0), (1, 4))],
        [((0, 0), (4, 1)), ((0, 1), (2, 3)), ((1, 1), (2, 3))],
    ],
)
def test_pieces_that_overlap_do_not_tile_a_tensor_though_their_sizes_add_up(
    boxes: list[tuple[tuple[int, int], tuple[int, int]]], tmp_path: Path
) -> None:
    held = sum(rows * columns for _, (rows, columns) in boxes)
    pieces = [Piece(f"rank-{number}", 0, *box) for number, box in enumerate(boxes)]
    where = LocalDirectory(tmp_path)
    with pytest.raises(CheckpointMismatchError, match=f"the {len(boxes)} pieces of a hold {held} elements"):
        tiled("a", torch.float32, (4, held // 4), pieces, where=where)
    with pytest.raises(CheckpointMismatchError):
        tiled("a", torch.float32, (4, held // 4), pieces[::-1], where=where)


def test_a_header_that_claims_an_exabyte_is_not_believed() -> None:
    with pytest.raises(CheckpointIncompleteError, match="not a whole safetensors file"):
        _open((1 << 60).to_bytes(8, "little") + WHOLE[8:])


def test_a_dtype_without_arithmetic_is_named(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / SINGLE_FILE)
    with pytest.raises(
        CheckpointMismatchError, match="w has dtype F8_E4M3, which cannot be extrapolated; known are F64"
    ):
        _weights(tmp_path)


def test_every_tensor_of_a_sharded_model_is_found_where_the_index_places_it(tmp_path: Path) -> None:
    state = drift()[0]
    weights = _weights(write_model(tmp_path / "m", state, shards=3))
    assert weights.tensors.keys() == state.keys()
    for name, entry in weights.tensors.items():
        buffer = bytearray(entry.nbytes)
        weights.read_into(entry, 0, memoryview(buffer))
        assert bytes(buffer) == state[name].reshape(-1).view(torch.uint8).numpy().tobytes(), name


def test_a_missing_shard_is_named_with_both_counts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", drift()[0], shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(
        CheckpointIncompleteError,
        match=r"names 3 shards and 2 are present \(missing model-00002-of-00003.safetensors\)",
    ):
        _weights(path)


def test_a_shard_without_a_tensor_the_index_places_in_it_is_incomplete(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", drift()[0], shards=2)
    index = json.loads((path / INDEX_FILE).read_text())
    index["weight_map"]["phantom"] = "model-00001-of-00002.safetensors"
    (path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointIncompleteError, match="places phantom in model-00001-of-00002"):
        _weights(path)


@pytest.mark.parametrize("shard", ["../../etc/passwd", "/etc/passwd", "..", ".hidden", "", "sub/model.safetensors", 7])
def test_an_index_may_not_point_outside_its_checkpoint(tmp_path: Path, shard: object) -> None:
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointMismatchError, match=r"places w in .*, which is not a plain file name"):
        _weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "holds a JSON list"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "no weight_map"),
    ],
)
def test_an_index_that_says_nothing_is_incomplete(tmp_path: Path, index: str, message: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointIncompleteError, match=message):
        _weights(tmp_path)


def test_a_single_file_beside_an_index_is_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", drift()[0], shards=2)
    (path / SINGLE_FILE).write_bytes(WHOLE)
    with pytest.raises(CheckpointMismatchError, match=r"has both model.safetensors and model.safetensors.index.json"):
        _weights(path)


def test_a_pickle_is_named_and_not_read(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointIncompleteError, match=r"pytorch_model\.bin is not read: save with safetensors"):
        _weights(tmp_path)


def _with_head(run_root: Path, *, tied: object, stale: float = 0.0) -> Run:
    states = drift({"model.embed_tokens.weight": (23, 8), "norm.weight": (8,)})
    for state in states.values():
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    states[40]["lm_head.weight"][22, 7] += stale
    return write_run(run_root, states, config={"tie_word_embeddings": True} if tied == "top" else {"text_config": tied})


@pytest.mark.parametrize("tied", ["top", {"tie_word_embeddings": True}])
def test_a_stored_copy_of_a_tied_head_is_dropped(tmp_path: Path, tied: object) -> None:
    trajectory = _with_head(tmp_path, tied=tied).open()
    assert trajectory.base.alias is not None
    out = load(write(trajectory, predict(trajectory), tmp_path / "out"))
    assert sorted(out) == ["mask", "model.embed_tokens.weight", "norm.weight", "position_ids"]


def test_a_tied_head_that_differs_in_one_element_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointMismatchError, match=r"checkpoint-40: .*tied, and lm_head.weight differs from model.embed"
    ):
        _with_head(tmp_path, tied="top", stale=0.5).open()


@pytest.mark.parametrize("untied", [None, {"tie_word_embeddings": False}])
def test_an_untied_head_is_a_tensor_like_any_other(tmp_path: Path, untied: object) -> None:
    trajectory = _with_head(tmp_path, tied=untied, stale=0.5).open()
    out = load(write(trajectory, predict(trajectory), tmp_path / "out"))
    assert not torch.equal(out["lm_head.weight"], out["model.embed_tokens.weight"])


def test_only_the_checkpoints_may_hold_the_alias(tmp_path: Path) -> None:
    run = _with_head(tmp_path, tied="top")
    state = {name: tensor for name, tensor in load(run.base).items() if name != "lm_head.weight"}
    write_model(run.base, state, config={"tie_word_embeddings": True})
    assert "lm_head.weight" not in {spec.name for spec in run.open().tensors}


def test_one_trajectory_has_one_precision(tmp_path: Path) -> None:
    states = drift()
    states[40] = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in states[40].items()}
    with pytest.raises(
        CheckpointMismatchError, match=r"checkpoint-40: .* is torch.float32, at step 10 it is torch.bfloat16"
    ):
        write_run(tmp_path, states).open()


def test_steps_that_do_not_increase_are_refused(run: Run) -> None:
    trajectory = run.open()
    with pytest.raises(RelexError, match=r"increasing steps, and these are at \[20, 10\]"):
        open_trajectory(trajectory.base, [trajectory.checkpoints[1], trajectory.checkpoints[0]])


def test_a_file_that_is_replaced_between_looking_and_checking_is_noticed(run: Run) -> None:
    trajectory = run.open()
    write_model(run.run / "checkpoint-25", drift(seed=1)[25])
    with pytest.raises(CheckpointError, match=r"checkpoint-25/model.safetensors changed while it was read \(size"):
        trajectory.check_unchanged()
