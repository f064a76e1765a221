"""Predictions written as adapters: what peft makes of them is the predicted model, within what the manifest says."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from relex.errors import CheckpointChangedError, OutputError, TargetError
from relex.extrapolation import extrapolate_run
from relex.forecast import Forecast
from relex.output import manifest
from relex.output.adapter import write_adapter
from relex.output.manifest import Manifest
from relex.output.materialise import rebuild
from relex.output.truncation import TOLERANCE
from relex.predictors import parse_method
from relex.trajectory import Trajectory
from tests.helpers.peft_files import load_adapter, load_base, logits, merge, states, write_run
from tests.helpers.trajectories import (
    MIB,
    TARGET,
    Run,
    content,
    drift,
    least_memory,
    load,
    predict,
    tree,
    write,
)
from tests.helpers.trajectories import write_run as write_models

KINDS: Mapping[str, Mapping[str, Any]] = {
    "rslora": {"rslora": True, "rank": 3},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"0.self_attn.v_proj": 5},
    },
    "modules_to_save": {"modules_to_save": ["lm_head", "norm"], "bias": "all"},
    "embeddings": {"targets": ["embed_tokens", "lm_head", "q_proj"]},
    "tied and saved": {"tied": True, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "conv1d": {"model": "gpt2", "targets": ["c_attn", "c_proj", "lm_head"]},
}


def write_one(trajectory: Trajectory, prediction: Forecast, out: Path) -> Path:
    write_adapter(trajectory, prediction, out, memory=64 * MIB, threads=2)
    return out


def deltas(run: Run, model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    base = states(load_base(run.base))
    return {name: tensor.double() - base[name].double() for name, tensor in model.items()}


@pytest.mark.parametrize(("kind", "method"), [*((kind, "relex") for kind in KINDS), ("embeddings", "hold")])
def test_what_peft_makes_of_an_adapter_is_the_predicted_model(kind: str, method: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", **KINDS[kind])
    trajectory = run.open()
    prediction = predict(trajectory, method)
    out = write_one(trajectory, prediction, tmp_path / "adapter")
    record = manifest.verify(out).adapter
    assert record is not None
    assert record.error <= TOLERANCE
    wanted = deltas(run, load(write(trajectory, prediction, tmp_path / "model")))
    result = deltas(run, states(merge(run.base, out)))
    for name, delta in wanted.items():
        error = record.errors.get(name.removesuffix(".weight"), 0.0)
        # Peft adds to the base in fp32.
        rounding = 1e-6 * float(delta.norm() + 1.0)
        assert float((result[name] - delta).norm()) <= error * float(delta.norm()) * 1.001 + rounding, name


def test_the_rank_is_the_smallest_that_holds_the_prediction(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rank_pattern={"q_proj": 2})
    trajectory = run.open()
    prediction = predict(trajectory)
    record = manifest.read(write_one(trajectory, prediction, tmp_path / "adapter")).adapter
    assert record is not None
    wanted = deltas(run, load(write(trajectory, prediction, tmp_path / "model")))
    for module, rank in record.ranks.items():
        sigma = torch.linalg.svdvals(wanted[f"{module}.weight"])
        tails = [float(sigma[kept:].norm() / sigma.norm()) for kept in range(len(sigma))]
        assert rank == next(kept for kept, tail in enumerate(tails) if tail <= TOLERANCE)
        assert record.errors[module] == pytest.approx(tails[rank], abs=1e-6)
    assert len(set(record.ranks.values())) > 1


def test_an_adapter_of_the_latest_checkpoint_has_its_rank_and_no_error(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path / "run", rslora=True, rank=3).open()
    record = manifest.read(write_one(trajectory, predict(trajectory, "hold"), tmp_path / "adapter")).adapter
    assert record is not None
    assert set(record.ranks.values()) == {3}
    assert record.error < 1e-6


def test_a_module_that_never_moved_is_a_zero_of_rank_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=(10, 25), init_lora_weights=True)
    for step in (10, 25):
        path = run.run / f"checkpoint-{step}"
        file = path / "adapter_model.safetensors"
        tensors = load(path)
        times = file.stat()
        save_file(
            {name: each * (0 if "0.self_attn.v_proj.lora_B" in name else 1) for name, each in tensors.items()}, file
        )
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    trajectory = run.open()
    out = write_one(trajectory, predict(trajectory), tmp_path / "adapter")
    record = manifest.read(out).adapter
    assert record is not None
    assert record.ranks["model.layers.0.self_attn.v_proj"] == 1
    assert float(deltas(run, states(merge(run.base, out)))["model.layers.0.self_attn.v_proj.weight"].norm()) == 0.0


def test_tied_weights_that_are_adapted_together_stay_together(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tied=True, targets=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    trajectory = run.open()
    prediction = predict(trajectory, "hold")
    out = write_one(trajectory, prediction, tmp_path / "adapter")
    loaded = load_adapter(run.base, out)
    model = load_base(write(trajectory, prediction, tmp_path / "model"))
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


def test_the_settings_are_the_runs_own_with_the_ranks_that_were_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", trainer="verl", rslora=True)
    trajectory = run.open()
    printed = json.loads(
        (write_one(trajectory, predict(trajectory), tmp_path / "out") / "adapter_config.json").read_bytes()
    )
    assert "runtime_config" not in printed
    assert printed["use_rslora"] is False
    assert printed["rank_pattern"] == printed["alpha_pattern"]
    assert sorted(printed["target_modules"]) == sorted(
        json.loads((run.run / "global_step_10/actor/lora_adapter/adapter_config.json").read_bytes())["target_modules"]
    )


def test_the_bytes_of_an_adapter_depend_on_nothing_but_the_input(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path / "run", modules_to_save=["norm"]).open()
    prediction = predict(trajectory)
    wanted = content(write_one(trajectory, prediction, tmp_path / "wanted"))
    least = least_memory(trajectory)
    write_adapter(trajectory, prediction, tmp_path / "found", memory=least + 2 * MIB, threads=1)
    assert content(tmp_path / "found") == wanted


def test_an_adapter_can_be_rebuilt_from_its_manifest(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path / "run").open()
    out = write_one(trajectory, predict(trajectory), tmp_path / "adapter")
    rebuild(out, tmp_path / "again", memory=64 * MIB, threads=1)
    assert content(tmp_path / "again") == content(out)


def test_an_adapter_that_is_there_is_left_alone(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path / "run").open()
    out = write_one(trajectory, predict(trajectory), tmp_path / "adapter")
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    write_one(trajectory, predict(trajectory), out)
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before


def test_a_whole_model_in_the_place_of_an_adapter_is_refused_and_kept(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path / "run").open()
    prediction = predict(trajectory)
    out = write(trajectory, prediction, tmp_path / "out")
    with pytest.raises(OutputError, match="exists and holds the prediction"):
        write_one(trajectory, prediction, out)
    assert manifest.verify(out).adapter is None


def test_an_input_that_changes_meanwhile_leaves_no_adapter_behind(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    trajectory = run.open()
    prediction = predict(trajectory)
    file = run.run / "checkpoint-40" / "adapter_model.safetensors"

    def touch(done: int, total: int) -> None:
        if done == total:
            os.utime(file)

    before = tree(tmp_path)
    with pytest.raises(CheckpointChangedError, match="changed while it was read"):
        write_adapter(trajectory, prediction, tmp_path / "out", memory=64 * MIB, threads=2, on_progress=touch)
    assert tree(tmp_path) == before


def extrapolated(run: Run, out: Path, **options: Any) -> Manifest:
    made = extrapolate_run(
        str(run.run),
        str(run.base),
        targets=[TARGET],
        out=out,
        method=parse_method("relex"),
        memory=64 * MIB,
        threads=2,
        grams=out.parent / "grams",
        staging=out.parent / "staging",
        form="adapter",
        **options,
    )
    return made[str(out / f"step-{TARGET}")]


def test_a_run_is_extrapolated_to_an_adapter_with_its_rank_and_error(tmp_path: Path) -> None:
    made = extrapolated(write_run(tmp_path / "run"), tmp_path / "out")
    assert made.adapter is not None
    shown = made.to_json()["adapter"]
    assert shown["rank"] == made.adapter.rank > 0
    assert 0 < shown["error"] <= TOLERANCE
    assert {"adapter_config.json", "adapter_model.safetensors"} <= made.files.keys()
    assert "config.json" not in made.files


def test_whole_models_are_not_extrapolated_to_an_adapter(tmp_path: Path) -> None:
    run = write_models(tmp_path, drift())
    with pytest.raises(TargetError, match=r"are whole models .*Leave out --adapter\."):
        extrapolated(run, tmp_path / "out")
    # Nor read for nothing.
    assert not (tmp_path / "grams").exists()


def test_dora_is_not_extrapolated_to_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"q_proj\.weight is adapted by DoRA"):
        extrapolated(write_run(tmp_path / "run", dora=True, targets=["q_proj"]), tmp_path / "out")


def test_an_adapter_has_no_precision_to_choose(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="--dtype bfloat16 says how a whole model is stored"):
        extrapolated(write_run(tmp_path / "run"), tmp_path / "out", dtype="bfloat16")
