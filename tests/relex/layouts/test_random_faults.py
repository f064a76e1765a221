"""Random faults, RELEX_FAULTS a layout: none is read wrong, none executes, none kills the process.

`make test` tries a few of them, the slow tests 100, `make soak` 2,000.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import dcp_files, peft_files, verl_files
from tests.helpers.random_faults import check_mutated_json, check_random_faults, states
from tests.helpers.trajectories import STEPS, Run, quiet, write_run

CASES = int(os.environ.get("RELEX_FAULTS", "100"))


def write_hf(root: Path) -> Run:
    return write_run(root, states(torch.bfloat16))


def write_hf_shards(root: Path) -> Run:
    return write_run(root, states(), shards=3)


def write_dcp(root: Path) -> Run:
    return dcp_files.write_dcp_run(root, states())


def write_dcp_safetensors(root: Path) -> Run:
    return dcp_files.write_dcp_safetensors_run(root, states())


def write_verl(root: Path) -> Run:
    return verl_files.write_run(root, states())


def write_verl_resumed_on_fewer(root: Path) -> Run:
    """Beside the files of two ranks lie those of three that saved the same steps before."""
    run = verl_files.write_run(root, states())
    before = verl_files.write_run(root / "before", states(), world=3)
    for file in before.run.rglob("model_world_size_3_*"):
        place = run.run / file.relative_to(before.run)
        times = place.parent.stat()
        shutil.copy2(file, place)
        os.utime(place, (0, 0))
        os.utime(place.parent, ns=(times.st_atime_ns, times.st_mtime_ns))
    shutil.rmtree(root / "before")
    return run


def write_verl_adapters(root: Path) -> Run:
    """What verl saves with save_lora_only."""
    base, chance = states()[0], torch.Generator().manual_seed(0)
    saved: dict[int, dict[str, torch.Tensor]] = {0: dict(base)}
    for step in STEPS:
        saved[step] = {}
        for name in ("model.layers.0.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
            rows, columns = base[f"{name}.weight"].shape
            for part, shape in (("A", (3, columns)), ("B", (rows, 3))):
                factor = torch.randn(shape, generator=chance)
                saved[step][f"base_model.model.{name}.lora_{part}.default.weight"] = factor
    run = verl_files.write_run(root, saved)
    for actor in run.run.glob("*/actor"):
        meta = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
        (actor / "lora_train_meta.json").write_text(json.dumps(meta))
        verl_files.quiet_step(actor.parent)
    quiet(run.run)
    return run


def write_adapters(root: Path) -> Run:
    return peft_files.write_run(root)


WRITERS: tuple[Callable[[Path], Run], ...] = (
    write_hf,
    write_hf_shards,
    write_verl,
    write_verl_resumed_on_fewer,
    write_adapters,
    write_verl_adapters,
    write_dcp,
    write_dcp_safetensors,
)


@pytest.mark.parametrize("cases", [20, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("write", WRITERS)
def test_no_random_fault_is_read_wrong(write: Callable[[Path], Run], tmp_path: Path, cases: int) -> None:
    refused = check_random_faults(write, tmp_path, cases=cases, seed=0)
    assert sum(refused.values()) > cases // 3, refused


@pytest.mark.parametrize("cases", [15, pytest.param(CASES, marks=pytest.mark.slow)])
@pytest.mark.parametrize("write", WRITERS)
def test_no_mutated_json_is_read_wrong(write: Callable[[Path], Run], tmp_path: Path, cases: int) -> None:
    refused = check_mutated_json(write, tmp_path, cases=cases, seed=0)
    assert sum(refused.values()) > cases // 10, refused
