"""What is not read is refused with the way out of the trainer that wrote it."""

import time
from pathlib import Path

import pytest

from relex import store
from relex.errors import CheckpointIncompleteError
from relex.files.local import LocalDirectory
from relex.layouts.foreign import megatron_files, refuse_known
from relex.store import State
from tests.helpers.trajectories import drift, quiet, write_model

ZERO = ("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt")
TORCH_DIST = (".metadata", "__0_0.distcp", "common.pt", "metadata.json")


def _refusal(directory: Path, *files: str) -> str:
    for name in files:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(b"anything")
    with pytest.raises(CheckpointIncompleteError) as caught:
        refuse_known(LocalDirectory(directory))
    return str(caught.value)


def _under(place: str, names: tuple[str, ...]) -> list[str]:
    return [f"{place}/{name}" for name in names]


def test_openrlhf_keeps_zero_beside_and_is_asked_for_its_export(tmp_path: Path) -> None:
    assert "--ckpt.save_hf (--save_hf_ckpt" in _refusal(tmp_path / "global_step25", *ZERO)


def test_trainer_with_zero_is_asked_to_gather_or_to_convert(tmp_path: Path) -> None:
    step = tmp_path / "checkpoint-25"
    files = ("zero_to_fp32.py", "latest", "trainer_state.json", "scheduler.pt", *_under("global_step25", ZERO))
    message = _refusal(step, *files)
    assert "DeepSpeed ZeRO: zero_to_fp32.py is not read" in message
    assert "stage3_gather_16bit_weights_on_model_save" in message
    assert "zero_to_fp32.py CHECKPOINT_DIR OUT --safe_serialization" in message


@pytest.mark.parametrize("place", ["actor/dist_ckpt", "actor/model/dist_ckpt"])
def test_verl_on_megatron_is_asked_for_the_model(tmp_path: Path, place: str) -> None:
    message = _refusal(tmp_path / "global_step_25", "data.pt", *_under(place, TORCH_DIST))
    assert f"verl's Megatron: {place}/common.pt is not read" in message
    assert "actor_rollout_ref.actor.checkpoint.save_contents=[model,optimizer,extra,hf_model]" in message
    assert "verl.model_merger merge --backend megatron" in message


def test_nemo_rl_on_megatron_is_pointed_to_its_converter(tmp_path: Path) -> None:
    message = _refusal(tmp_path / "step_25", *_under("policy/weights/iter_0000000", TORCH_DIST))
    assert "examples/converters/convert_megatron_to_hf.py" in message


@pytest.mark.parametrize("names", [TORCH_DIST, TORCH_DIST[2:], ("mp_rank_00/model_optim_rng.pt",)])
def test_megatron_itself_is_pointed_to_slime_and_to_the_bridge(tmp_path: Path, names: tuple[str, ...]) -> None:
    message = _refusal(tmp_path / "iter_0000025", *names)
    assert "--save-hf 'OUT/hf_{rollout_id}'" in message
    assert "export_ckpt(ITER_DIR, OUT)" in message


def test_a_run_of_megatron_is_broken_at_every_step_and_says_why(tmp_path: Path) -> None:
    base = store.open_base(write_model(tmp_path / "base", drift()[0]))
    for step in (10, 25):
        directory = tmp_path / "run" / f"iter_{step:07}"
        directory.mkdir(parents=True)
        for name in TORCH_DIST:
            (directory / name).write_bytes(b"anything")
        quiet(directory)
    stored = store.scan(tmp_path / "run", base, now=time.time())
    assert [(checkpoint.step, checkpoint.state) for checkpoint in stored] == [(10, State.BROKEN), (25, State.BROKEN)]
    assert "holds Megatron: common.pt is not read" in stored[0].reason


def test_a_quantised_export_is_not_what_was_trained(tmp_path: Path) -> None:
    assert "Give the safetensors it was made from" in _refusal(tmp_path / "step_25", "qwen-q4_k_m.gguf")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "policy.pt", "model.pt"]
)
def test_pickled_weights_are_to_be_saved_as_safetensors(tmp_path: Path, name: str) -> None:
    assert f"a pickle: {name} is not read: save with safetensors" in _refusal(tmp_path / "checkpoint-25", name)


def test_what_a_trainer_writes_before_its_weights_is_not_called_foreign(tmp_path: Path) -> None:
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state_0.pth",
        "training_args.bin",
        "trainer/dataloader/rank_0.pt",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"anything")
    refuse_known(LocalDirectory(tmp_path))


def test_a_distributed_checkpoint_of_torch_is_not_megatrons() -> None:
    assert megatron_files([".metadata", "__0_0.distcp", "config.json"]) == []
    assert megatron_files([".metadata", "__0_0.distcp", "metadata.json"]) == ["metadata.json"]
