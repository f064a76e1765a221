"""Three hundred random faults a layout: none is read wrong, none executes, none kills the process."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.layouts import dcp_files
from tests.layouts.random_faults import check_random_faults, states
from tests.relex.trajectories import Run, write_run

CASES = 300


def write_hf(root: Path) -> Run:
    return write_run(root, states(torch.bfloat16))


def write_hf_shards(root: Path) -> Run:
    return write_run(root, states(), shards=3)


def write_dcp(root: Path) -> Run:
    return dcp_files.write_dcp_run(root, states())


def write_dcp_safetensors(root: Path) -> Run:
    return dcp_files.write_dcp_safetensors_run(root, states())


WRITERS: tuple[Callable[[Path], Run], ...] = (write_hf, write_hf_shards, write_dcp, write_dcp_safetensors)


@pytest.mark.parametrize("write", WRITERS)
def test_no_random_fault_is_read_wrong(write: Callable[[Path], Run], tmp_path: Path) -> None:
    refused = check_random_faults(write, tmp_path, cases=CASES, seed=0)
    assert sum(refused.values()) > CASES // 2, refused
