"""verl's FSDP checkpoints: what two versions of FSDP write, and which of a directory's files are the checkpoint."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from relex import store
from relex.errors import CheckpointError, CheckpointIncompleteError, CheckpointMismatchError
from relex.files.local import LocalDirectory
from relex.layouts import verl_fsdp
from relex.layouts.detection import open_any
from relex.layouts.factors import LowRank
from relex.layouts.weights import TensorEntry, Weights
from relex.output.adapter import write_adapter
from relex.store import State
from tests.helpers import ROOT
from tests.helpers.peft_files import merge
from tests.helpers.trajectories import MIB, Run, content, drift, load, measure, predict, quiet, write, write_model
from tests.helpers.verl_files import rank_file, rank_of, write_rank, write_run
from tests.relex.layouts.gloo_verl import BUFFER, KINDS, LORA, STEPS, WORLD

SETTINGS = "fsdp_config.json"
WEIGHT = "model.layers.0.mlp.weight"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a tiny model once in every way to shard, by as many processes as there are ranks."""
    root = tmp_path_factory.mktemp("verl")
    script = Path(__file__).with_name("gloo_verl.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    log = root / "log"
    with log.open("w") as output:
        # In a session of its own, so that the ranks it forks end with it.
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(root)],
            env=environment,
            stderr=output,
            start_new_session=True,
        )
    try:
        assert process.wait(timeout=300) == 0, log.read_text()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return root


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return write_run(tmp_path, drift(stored=torch.float32))


def actor_of(run: Run, step: int = 20) -> Path:
    return run.run / f"global_step_{step}" / "actor"


def open_step(run: Run, step: int = 20) -> Weights:
    directory = verl_fsdp.find(LocalDirectory(actor_of(run, step).parent))
    assert directory is not None
    return verl_fsdp.open_weights(directory, base=store.open_base(run.base))


def values(weights: Weights, entry: TensorEntry) -> Tensor:
    buffer = bytearray(entry.nbytes)
    weights.read_into(entry, 0, memoryview(buffer))
    return torch.frombuffer(buffer, dtype=entry.dtype).reshape(entry.shape)


def check_equal(weights: Weights, expected: Mapping[str, Tensor]) -> None:
    entries = dict(weights.tensors) | ({} if weights.alias is None else {weights.alias.name: weights.alias})
    assert entries.keys() == expected.keys()
    for name, tensor in expected.items():
        assert entries[name].dtype is tensor.dtype, name
        assert torch.equal(values(weights, entries[name]), tensor), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", STEPS)
def test_every_tensor_is_the_gathered_one(kind: str, step: int, trained: Path) -> None:
    weights = open_step(Run(trained / "base", trained / kind / "run"), step)
    check_equal(weights, load(trained / kind / "full" / f"checkpoint-{step}"))
    assert weights.alias is not None
    assert len(weights.files) == WORLD


@pytest.mark.parametrize(("kind", "parts"), [("fsdp2", 4), ("fsdp2_hybrid", 2), ("fsdp1", 4), ("fsdp1_hybrid", 2)])
def test_one_replica_is_read(kind: str, parts: int, trained: Path) -> None:
    tensors = open_step(Run(trained / "base", trained / kind / "run"), 25).tensors
    assert len(tensors["model.layers.1.mlp.up_proj.weight"].pieces) == parts
    assert len(tensors[BUFFER].pieces) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_from_it_is_the_one_from_whole_files(kind: str, trained: Path, tmp_path: Path) -> None:
    ours = Run(trained / "base", trained / kind / "run").open()
    whole = Run(trained / "base", trained / kind / "full").open()
    prediction, expected = predict(ours), predict(whole)
    assert prediction.tensors == expected.tensors
    assert prediction.digests == expected.digests
    assert content(write(ours, prediction, tmp_path / "ours")) == content(write(whole, expected, tmp_path / "whole"))


@pytest.mark.parametrize("world", [1, 2, 3, 40])
def test_any_number_of_ranks_gives_the_same_tensors(world: int, tmp_path: Path) -> None:
    states = drift(stored=torch.float32)
    run = write_run(tmp_path, states, world=world)
    for checkpoint in run.open().checkpoints:
        check_equal(checkpoint.weights, states[checkpoint.step])


def test_the_directory_of_the_files_can_be_opened_itself(run: Run) -> None:
    directory = LocalDirectory(actor_of(run))
    assert verl_fsdp.find(directory) == directory
    assert verl_fsdp.find(LocalDirectory(run.base)) is None


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize("settings", [True, False])
def test_a_missing_rank_is_named(rank: int, settings: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path, drift(stored=torch.float32), world=3)
    (actor_of(run) / rank_file(rank, world=3)).unlink()
    if not settings:
        (actor_of(run) / SETTINGS).unlink()
    with pytest.raises(CheckpointIncompleteError, match=rf"of 3 ranks 2 are present \(missing .*_rank_{rank}\.pt\)"):
        open_step(run)


def leave_over(run: Run, *, seconds: float) -> dict[str, Tensor]:
    """Put one step's files of three ranks, written `seconds` ago, beside those of two; return what they hold."""
    states = drift(stored=torch.float32, seed=1)
    actor = actor_of(run)
    then = time.time() - seconds
    for rank in range(3):
        with rank_of(rank, world=3) as mesh:
            os.utime(write_rank(actor, states[20], mesh), (then, then))
    return states[20]


def test_files_of_another_number_of_ranks_are_not_looked_at(run: Run) -> None:
    leave_over(run, seconds=5)
    check_equal(open_step(run), drift(stored=torch.float32)[20])
    (actor_of(run) / rank_file(2, world=3)).write_bytes(b"torn")
    check_equal(open_step(run), drift(stored=torch.float32)[20])


def test_of_two_sets_the_newer_is_meant(run: Run) -> None:
    (actor_of(run) / SETTINGS).unlink()
    newer = leave_over(run, seconds=5)
    check_equal(open_step(run), newer)
    leave_over(run, seconds=500)
    check_equal(open_step(run), drift(stored=torch.float32)[20])


def test_a_set_that_is_not_whole_is_not_meant(run: Run) -> None:
    (actor_of(run) / SETTINGS).unlink()
    leave_over(run, seconds=500)
    (actor_of(run) / rank_file(1, world=3)).unlink()
    check_equal(open_step(run), drift(stored=torch.float32)[20])


def test_two_sets_of_one_time_are_refused(run: Run) -> None:
    (actor_of(run) / SETTINGS).unlink()
    leave_over(run, seconds=5)
    os.utime(actor_of(run) / rank_file(0, world=3), (1e9, 1e9))
    with pytest.raises(CheckpointMismatchError, match="files of 2 ranks and of 3 ranks"):
        open_step(run)


@pytest.mark.parametrize("text", ["", "{}", '{"world_size": "2"}', '{"world_size": true}', "[2]"])
def test_settings_that_say_no_number_of_ranks_are_incomplete(text: str, run: Run) -> None:
    (actor_of(run) / SETTINGS).write_text(text)
    with pytest.raises(CheckpointIncompleteError, match=SETTINGS):
        open_step(run)


def test_it_is_preferred_over_a_merge_beside_it(run: Run) -> None:
    merge = {name: tensor.bfloat16() for name, tensor in drift(stored=torch.float32)[20].items()}
    write_model(actor_of(run) / "huggingface", merge)
    base = store.open_base(run.base)
    assert open_any(LocalDirectory(actor_of(run).parent), base=base).layout == "verl_fsdp"
    for rank in range(2):
        (actor_of(run) / rank_file(rank)).unlink()
    assert open_any(LocalDirectory(actor_of(run).parent), base=base).layout == "hf"


def test_whether_the_head_is_tied_its_own_config_says_or_the_base(run: Run) -> None:
    assert open_step(run).alias is None
    own = actor_of(run) / "huggingface" / "config.json"
    own.write_text(json.dumps({"tie_word_embeddings": True}))
    assert open_step(run).alias is not None
    own.unlink()
    assert open_step(run).alias is None
    (run.base / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    assert open_step(run).alias is not None


def test_a_step_that_is_being_written_is_not_ready_yet(run: Run) -> None:
    (run.run / "latest_checkpointed_iteration.txt").write_text("40")
    (actor_of(run, 75) / rank_file(1)).unlink()
    base = store.open_base(run.base)
    states = {each.step: each.state for each in store.scan(run.run, base, now=time.time())}
    assert states == {10: State.READY, 20: State.READY, 25: State.READY, 40: State.READY, 75: State.NOT_YET}


def save_ranks(run: Run, placement: Placement, *, world: int = 2, axes: int = 1) -> None:
    """Write step 20 again, its largest tensor with placements of one kind along every axis of the mesh."""
    state = drift(stored=torch.float32)[20]
    whole = state[WEIGHT]
    for rank in range(world):
        with rank_of(rank, world=world) as mesh:
            grid = mesh if axes == 1 else init_device_mesh("cpu", (1, world))
            part = _local(whole, placement, rank, world)
            placed = DTensor.from_local(
                part, grid, [placement] * axes, run_check=False, shape=whole.shape, stride=whole.stride()
            )
            write_rank(actor_of(run), state | {WEIGHT: placed}, mesh)


def _local(tensor: Tensor, placement: Placement, rank: int, world: int) -> Tensor:
    if not isinstance(placement, Shard):
        return tensor
    return tensor.chunk(world, dim=placement.dim)[rank].clone(memory_format=torch.contiguous_format)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
def test_a_tensor_may_be_split_along_any_dimension(placement: Placement, run: Run) -> None:
    save_ranks(run, placement)
    check_equal(open_step(run), drift(stored=torch.float32)[20])


@pytest.mark.parametrize(
    ("placement", "axes", "message"),
    [
        (Partial(), 1, "its placement is Partial"),
        (_StridedShard(0, split_factor=2), 1, "its placement is _StridedShard"),
        (Shard(0), 2, r"its dimensions \[0, 0\] are split"),
    ],
)
def test_other_ways_to_split_are_refused_by_name(placement: Placement, axes: int, message: str, run: Run) -> None:
    save_ranks(run, placement, axes=axes)
    with pytest.raises(CheckpointMismatchError, match=rf"{WEIGHT} .*\({message}\).*verl\.model_merger"):
        open_step(run)


def test_a_rank_of_another_model_is_refused(run: Run) -> None:
    actor = actor_of(run)
    for change, message in (
        ({WEIGHT: torch.zeros(258, 301)}, rf"{WEIGHT} in 2 shapes"),
        ({WEIGHT: torch.zeros(257, 301).half()}, rf"{WEIGHT} in 2 shapes, dtypes"),
        ({"model.norm.weight": torch.zeros(8)}, r"only one of .*_rank_0\.pt and .*_rank_1\.pt has model\.norm\.weight"),
    ):
        with rank_of(1, world=2) as mesh:
            write_rank(actor, drift(stored=torch.float32)[20] | change, mesh)
        with pytest.raises(CheckpointMismatchError, match=message):
            open_step(run)


def test_the_same_rank_twice_is_refused(run: Run) -> None:
    shutil.copy(actor_of(run) / rank_file(0), actor_of(run) / rank_file(1))
    with pytest.raises(CheckpointMismatchError, match=r"shape \[12, 8\]; by its place in the mesh \[1\] .* \[23, 8\]"):
        open_step(run)


@pytest.mark.parametrize(
    "saved", [{}, [torch.ones(2)], {"w": "text"}, {WEIGHT: {"inner": torch.ones(2)}}, {3: torch.ones(2)}]
)
def test_what_is_no_state_dict_is_refused(saved: object, run: Run) -> None:
    torch.save(saved, actor_of(run) / rank_file(1))
    with pytest.raises(CheckpointMismatchError, match=rank_file(1)):
        open_step(run)


@pytest.mark.parametrize("kind", LORA)
def test_the_ranks_of_a_lora_run_are_the_adapter_that_peft_saves(kind: str, trained: Path) -> None:
    ours = Run(trained / "base", trained / kind / "run").open()
    theirs = Run(trained / "base", trained / kind / "full").open()
    assert ours.steps == theirs.steps == STEPS
    assert [spec.name for spec in ours.tensors if spec.relative] == [
        spec.name for spec in theirs.tensors if spec.relative
    ]
    assert sum(spec.relative for spec in ours.tensors) == 6
    assert torch.equal(measure(ours).products, measure(theirs).products)
    assert bool(measure(ours).products.any())
    for one, other in zip(ours.adapters, theirs.adapters, strict=True):
        assert len(one.files) == WORLD + 1
        for name, entry in one.tensors.items():
            if isinstance(entry, LowRank):
                assert torch.equal(values(one, entry), values(other, other.tensors[name]))


def test_an_adapter_predicted_from_ranks_is_one_for_peft(trained: Path, tmp_path: Path) -> None:
    run = Run(trained / "base", trained / "lora_only_fsdp2" / "run")
    trajectory = run.open()
    made = predict(trajectory, "hold")
    write_adapter(trajectory, made, tmp_path / "adapter", memory=64 * MIB, threads=1)
    write(trajectory, made, tmp_path / "whole")
    whole, merged = load(tmp_path / "whole"), merge(trained / "base", tmp_path / "adapter").state_dict()
    for name in whole.keys() & merged.keys():
        assert torch.allclose(whole[name].float(), merged[name], atol=1e-5), name


@pytest.fixture
def lora(trained: Path, tmp_path: Path) -> Path:
    """A run of adapters of its own, and of it one step."""
    shutil.copytree(trained / "lora_fsdp2" / "run", tmp_path / "lora")
    return tmp_path / "lora" / "global_step_25" / "actor"


def opened(actor: Path, trained: Path) -> Weights:
    return verl_fsdp.open_weights(LocalDirectory(actor), base=store.open_base(trained / "base"))


def test_a_lora_run_without_its_scale_says_what_to_write(lora: Path, trained: Path) -> None:
    (lora / "lora_train_meta.json").unlink()
    with pytest.raises(CheckpointIncompleteError, match=r'write it there: \{"r": RANK, "lora_alpha": ALPHA\}'):
        opened(lora, trained)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"r": 4}, "has rank 3 in model_world_size_4_rank_0.pt and 4 in lora_train_meta.json"),
        ({"r": "3"}, "lora_train_meta.json: r is '3'"),
        ({"lora_alpha": None}, "lora_train_meta.json: lora_alpha is None"),
        ({"task_type": []}, r"lora_train_meta.json: task_type is \[\]"),
    ],
)
def test_settings_that_do_not_fit_the_factors_are_named(
    changes: Mapping[str, object], said: str, lora: Path, trained: Path
) -> None:
    settings = lora / "lora_train_meta.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | changes))
    with pytest.raises(CheckpointMismatchError, match=said):
        opened(lora, trained)


def test_a_lora_run_of_another_base_is_refused(lora: Path, run: Run) -> None:
    with pytest.raises(CheckpointMismatchError, match="Give the base this run was started from"):
        verl_fsdp.open_weights(LocalDirectory(lora), base=store.open_base(run.base))


def test_the_adapter_that_an_earlier_verl_exported_is_preferred(run: Run) -> None:
    (actor_of(run) / "lora_adapter").mkdir()
    assert verl_fsdp.find(LocalDirectory(actor_of(run).parent)) is None


@pytest.mark.parametrize(("older", "state"), [(0, State.READY), (5, State.NOT_YET)])
def test_what_verl_writes_last_with_megatron_is_its_marker(older: int, state: State, tmp_path: Path) -> None:
    run = Run(tmp_path / "base", tmp_path / "run")
    states = drift()
    write_model(run.base, states[0])
    step = run.run / "global_step_10" / "actor"
    write_model(step / "model" / "huggingface", states[10])
    (step / "ckpt_contents.json").write_text(json.dumps({"schema_version": 2}))
    then = time.time() - older
    os.utime(step / "ckpt_contents.json", (then, then))
    for file in (step / "model" / "huggingface").iterdir():
        os.utime(file) if older else quiet(file.parent)
    (checkpoint,) = store.scan(run.run, store.open_base(run.base), now=time.time() + 1)
    assert checkpoint.state is state, checkpoint.reason
    assert older == 0 or "the weights are newer than ckpt_contents.json" in checkpoint.reason


def test_a_rank_file_with_a_payload_executes_nothing(run: Run, tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {canary}",)

    torch.save({"w": Payload()}, actor_of(run) / rank_file(1))
    quiet(actor_of(run))
    quiet(actor_of(run).parent)
    with pytest.raises(CheckpointError, match=r"step 20 is broken: .* names posix\.system"):
        run.open()
    assert not canary.exists()
