"""Checkpoints of torch.distributed.checkpoint, written by it: by two processes with FSDP2, and without processes."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from relex import store
from relex.errors import CheckpointError, CheckpointIncompleteError, CheckpointMismatchError
from relex.files.local import LocalDirectory
from relex.layouts import dcp
from relex.layouts.detection import open_any
from relex.layouts.weights import Weights
from relex.store import State
from tests.helpers.dcp_files import WORLD, quiet_tree, save, write_dcp_run
from tests.helpers.random_faults import states
from tests.helpers.trajectories import Run, content, drift, predict, quiet, write, write_model

GLOO_SECONDS = 400


@pytest.fixture(scope="session")
def gloo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes of one FSDP2 run saved, in every way that trainers do; see dcp_gloo."""
    root = tmp_path_factory.mktemp("gloo")
    command = [sys.executable, "-m", "tests.relex.layouts.dcp_gloo", str(root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([*command, str(rank), str(WORLD)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        for process in processes:
            _, errors = process.communicate(timeout=GLOO_SECONDS)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return root


def tensor_bytes(weights: Weights, name: str) -> bytes:
    entry = weights.tensors[name]
    buffer = bytearray(entry.nbytes)
    weights.read_into(entry, 0, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "nemo", "plain", "safetensors"])
def test_every_tensor_of_two_processes_is_the_gathered_one(gloo: Path, kind: str) -> None:
    base = store.open_base(gloo / "base")
    stored = store.scan(gloo / kind, base, now=time.time() + 60)
    assert [(checkpoint.step, checkpoint.state) for checkpoint in stored] == [
        (step, State.READY) for step in (10, 25, 40)
    ]
    for checkpoint in stored:
        assert checkpoint.weights is not None
        full = load_file(gloo / "full" / f"checkpoint-{checkpoint.step}" / "model.safetensors")
        assert checkpoint.weights.tensors.keys() == full.keys()
        for name, tensor in full.items():
            assert tensor_bytes(checkpoint.weights, name) == tensor.numpy().tobytes(), (checkpoint.step, name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trainer", "nemo", "plain", "safetensors"])
def test_a_prediction_from_shards_is_the_prediction_from_whole_models(gloo: Path, kind: str, tmp_path: Path) -> None:
    quiet_tree(gloo / kind)
    outputs = {}
    for name in ("full", kind):
        trajectory = Run(gloo / "base", gloo / name).open()
        assert (name == kind) == any(len(spec.entries[0].pieces) > 1 for spec in trajectory.tensors)
        prediction = predict(trajectory)
        outputs[name] = prediction.tensors, content(write(trajectory, prediction, tmp_path / name))
    assert outputs[kind] == outputs["full"]


@pytest.mark.slow
def test_a_tied_head_stored_beside_its_embedding_is_dropped(gloo: Path) -> None:
    base = store.open_base(gloo / "base")
    weights = open_any(LocalDirectory(gloo / "trainer" / "step_10"), base=base)
    assert weights.alias is not None
    assert weights.alias.name == "lm_head.weight"


def _one(root: Path, state: dict[str, Any], *, base: dict[str, Any], world: int = WORLD) -> Callable[[], Weights]:
    """Save one checkpoint at root/c and return what opens it against `base`."""
    save(state, FileSystemWriter(root / "c"), world=world)
    opened = store.open_base(write_model(root / "base", base))
    return lambda: open_any(LocalDirectory(root / "c"), base=opened)


def _state() -> dict[str, Any]:
    return dict(states()[10])


@pytest.mark.parametrize("world", [1, 5, 70])
@pytest.mark.parametrize("prefix", ["app.model", "model", ""])
def test_any_number_of_ranks_reads_the_same(tmp_path: Path, world: int, prefix: str) -> None:
    state = _state()
    nested: dict[str, Any] = state
    for part in reversed([part for part in prefix.split(".") if part]):
        nested = {part: nested}
    weights = _one(tmp_path, nested, base=state, world=world)()
    assert weights.layout == "dcp"
    assert weights.tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensor_bytes(weights, name) == tensor.contiguous().numpy().tobytes(), name


def test_integers_and_scalars_are_tensors_too(tmp_path: Path) -> None:
    state = dict(drift()[20])
    weights = _one(tmp_path, state, base=state)()
    assert weights.tensors["scale"].shape == ()
    assert tensor_bytes(weights, "mask") == state["mask"].numpy().tobytes()


@pytest.mark.parametrize("place", ["", "trainer", "policy/weights", "policy/weights/model", "pytorch_model_fsdp_0"])
def test_it_is_found_where_trainers_put_it(tmp_path: Path, place: str) -> None:
    _one(tmp_path / "step_10" / place, _state(), base=_state())
    (tmp_path / "step_10" / place / "c").rename(tmp_path / "moved")
    step = tmp_path / "run" / "step_10"
    (step / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "moved").rename(step / place)
    loaded = dcp.find(LocalDirectory(step))
    assert loaded is not None
    assert str(loaded) == str(step / place)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run like prime-rl's, to be damaged at will."""
    return write_dcp_run(tmp_path, states())


def _states(run: Run, *, now: float | None = None) -> dict[int, tuple[State, str]]:
    base = store.open_base(run.base)
    return {
        checkpoint.step: (checkpoint.state, checkpoint.reason)
        for checkpoint in store.scan(run.run, base, now=now if now else time.time())
    }


def test_the_weights_are_ready_as_soon_as_metadata_is_there(run: Run) -> None:
    directory = run.run / "step_25" / "trainer"
    for name in ("__0_0.distcp", "__1_0.distcp", ".metadata"):
        os.utime(directory / name)
    assert _states(run)[25] == (State.READY, "")


def test_files_newer_than_metadata_are_being_written_again(run: Run) -> None:
    os.utime(run.run / "step_25" / "trainer" / "__1_0.distcp")
    state, reason = _states(run)[25]
    assert state is State.NOT_YET
    assert "the weights are newer than .metadata" in reason


def test_without_metadata_it_is_not_complete(run: Run) -> None:
    (run.run / "step_75" / "trainer" / ".metadata").unlink()
    state, reason = _states(run)[75]
    assert state is State.NOT_YET
    assert "has no .metadata, which is written last" in reason


@pytest.mark.parametrize("rank", range(WORLD))
def test_a_missing_rank_is_named(run: Run, rank: int) -> None:
    (run.run / "step_75" / "trainer" / f"__{rank}_0.distcp").unlink()
    state, reason = _states(run)[75]
    assert state is State.NOT_YET
    assert f"places weights in __{rank}_0.distcp of" in reason
    assert "which is missing" in reason


def test_a_file_of_another_length_is_named_with_both(run: Run) -> None:
    file = run.run / "step_75" / "trainer" / "__0_0.distcp"
    size = file.stat().st_size
    with file.open("ab") as handle:
        handle.write(b"\0")
    quiet(file.parent)
    assert f"__0_0.distcp of {size} bytes, which has {size + 1}" in _states(run)[75][1]


def test_metadata_of_another_step_does_not_pass_for_these_files(tmp_path: Path) -> None:
    state = _state()
    opened = _one(tmp_path, state, base=state)
    wider = {name: torch.cat([tensor, tensor]) for name, tensor in state.items()}
    save(wider, FileSystemWriter(tmp_path / "other"))
    for name in ("__0_0.distcp", "__1_0.distcp"):
        (tmp_path / "other" / name).replace(tmp_path / "c" / name)
    with pytest.raises(CheckpointIncompleteError, match=r"is not complete: \.metadata places weights in __0_0\.distcp"):
        opened()


def test_boxes_of_another_shape_at_the_same_bytes_are_of_another_checkpoint(tmp_path: Path) -> None:
    state = {"a.weight": torch.randn(4, 6)}
    opened = _one(tmp_path, state, base=state, world=1)
    save({"a.weight": torch.randn(6, 4)}, FileSystemWriter(tmp_path / "other"), world=1)
    (tmp_path / "other" / "__0_0.distcp").replace(tmp_path / "c" / "__0_0.distcp")
    with pytest.raises(
        CheckpointMismatchError, match=r"places torch\.float32 \[4, 6\] of a\.weight at byte 0 .* \[6, 4\]"
    ):
        opened()


def test_names_unlike_the_bases_are_shown(tmp_path: Path) -> None:
    state = _state()
    renamed = {f"decoder.{name}": tensor for name, tensor in state.items()}
    with pytest.raises(CheckpointMismatchError, match=r"none of its 5 tensors \(decoder\.lm_head\.weight, …\)"):
        _one(tmp_path, renamed, base=state)()


def test_a_tensor_that_the_base_lacks_is_not_skipped(tmp_path: Path) -> None:
    run = write_dcp_run(tmp_path, {step: dict(state) for step, state in states().items()})
    base = store.open_base(write_model(tmp_path / "smaller", {k: v for k, v in _state().items() if "mlp" not in k}))
    (checkpoint, *_) = store.scan(run.run, base, now=time.time())
    assert checkpoint.state is State.BROKEN
    assert "has tensor model.layers.0.mlp.down_proj.weight" in checkpoint.reason


def test_a_compressed_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    opened = _rewritten(
        tmp_path, lambda metadata: _first_place(metadata).update(transform_descriptors=["stream.zstd/1"])
    )
    with pytest.raises(CheckpointMismatchError, match=r"is stored as \['stream\.zstd/1'\], which is not read"):
        opened()


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", ".metadata", "a/b.distcp", ".."])
def test_metadata_may_not_point_outside_its_checkpoint(tmp_path: Path, file: str) -> None:
    opened = _rewritten(tmp_path, lambda metadata: _first_place(metadata).update(relative_path=file))
    with pytest.raises(CheckpointMismatchError, match="which is not a plain file name"):
        opened()


@pytest.mark.parametrize("values", [{"offset": -1}, {"length": 1 << 60}, {"offset": 1.5}, {"relative_path": 7}])
def test_metadata_with_odd_places_is_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    opened = _rewritten(tmp_path, lambda metadata: _first_place(metadata).update(values))
    with pytest.raises(CheckpointError):
        opened()


def _laughing() -> tuple[Any, ...]:
    """Return a small tuple with 2^60 leaves when it is written out."""
    laughing: tuple[Any, ...] = ()
    for _ in range(60):
        laughing = (laughing, laughing)
    return laughing


def _deep() -> tuple[Any, ...]:
    deep: tuple[Any, ...] = ()
    for _ in range(90):
        deep = (deep,)
    return deep


@pytest.mark.timeout(20)
@pytest.mark.parametrize("value", [_laughing(), _deep()], ids=["laughing", "deep"])
@pytest.mark.parametrize("field", ["offset", "length", "relative_path", "transform_descriptors"])
def test_metadata_that_would_be_read_for_ever_is_refused(tmp_path: Path, field: str, value: object) -> None:
    opened = _rewritten(tmp_path, lambda metadata: _first_place(metadata).update({field: value}))
    with pytest.raises(CheckpointMismatchError) as caught:
        opened()
    assert len(str(caught.value)) < 1000


@pytest.mark.timeout(20)
@pytest.mark.parametrize("value", [_laughing(), _deep(), 7], ids=["laughing", "deep", "number"])
def test_a_name_in_metadata_is_text(tmp_path: Path, value: object) -> None:
    def rename(metadata: Any) -> None:
        # Behind the back of the dict, which would hash it.
        object.__setattr__(next(iter(metadata.storage_data)), "fqn", value)

    with pytest.raises(CheckpointMismatchError):
        _rewritten(tmp_path, rename)()


@pytest.mark.parametrize("change", [lambda chunks: chunks.pop(), lambda chunks: chunks.append(chunks[0])])
def test_a_box_that_is_named_twice_or_not_at_all_is_refused(
    tmp_path: Path, change: Callable[[list[Any]], object]
) -> None:
    name = "model.embed_tokens.weight"
    opened = _rewritten(tmp_path, lambda metadata: change(metadata.state_dict_metadata[name].chunks))
    with pytest.raises(CheckpointMismatchError, match=r"pieces of model\.embed_tokens\.weight hold"):
        opened()


def test_megatrons_own_use_of_the_format_is_left_to_its_refusal(tmp_path: Path) -> None:
    opened = _one(tmp_path, _state(), base=_state())
    (tmp_path / "c" / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    with pytest.raises(CheckpointIncompleteError, match=r"holds Megatron: metadata\.json is not read"):
        opened()


def _rewritten(root: Path, change: Callable[[Any], object]) -> Callable[[], Weights]:
    """Save a checkpoint whose metadata `change` was applied to."""
    state = _state()
    opened = _one(root, state, base=state)
    metadata = pickle.loads((root / "c" / ".metadata").read_bytes())
    change(metadata)
    (root / "c" / ".metadata").write_bytes(pickle.dumps(metadata))
    return opened


def _first_place(metadata: Any) -> dict[str, Any]:
    """Return the attributes of the place of the first box."""
    result: dict[str, Any] = vars(next(iter(metadata.storage_data.values())))
    return result
