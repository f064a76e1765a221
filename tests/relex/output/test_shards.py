import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import NoReturn

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex.errors import CheckpointChangedError, MemoryBudgetError, NonFiniteError, OutputError
from relex.layouts.hf import INDEX_FILE, SINGLE_FILE
from relex.output import manifest
from relex.output.materialise import Output, materialise, rebuild
from relex.output.shards import Shard, Spread, write_shard
from relex.progress import Progress
from relex.trajectory import Trajectory
from tests.helpers import ROOT
from tests.helpers.trajectories import MIB, Run, content, drift, load, predict, tree, write, write_run
from tests.relex.output.shard_workers import SHARD_SIZE, ask

# One larger than a shard, the others such that no two share one but for the small ones at the end.
BIG = {"model.embed_tokens.weight": (1025, 1031), **{f"model.layers.{n}.mlp.weight": (300, 1001) for n in range(6)}}
SMALL = {"model.norm.weight": (8,), "scale": ()}


def one_by_one(shards: Sequence[Shard], on_progress: Progress | None) -> None:
    for done, shard in enumerate(shards, 1):
        write_shard(shard)
        if on_progress is not None:
            on_progress(done, len(shards))


def cut(
    trajectory: Trajectory, out: Path, shard_size: int | None, *, spread: Spread | None = None, target: int = 200
) -> Path:
    outputs = [Output(predict(trajectory, target=target), out)]
    materialise(trajectory, outputs, memory=64 * MIB, threads=2, shard_size=shard_size, spread=spread)
    return out


def digests(out: Path) -> dict[str, str]:
    """Every file below `out`, manifests too."""
    return {
        str(file.relative_to(out)): sha256(file.read_bytes()).hexdigest() for file in out.rglob("*") if file.is_file()
    }


def written_by_processes(root: Path, out: Path, *, workers: int, point: str = "none") -> list[tuple[str, str, str]]:
    """Return of every file that was begun: the process, the output, and the shard."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("shard_workers.py")), *map(str, (root, out, workers, point))],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return [(pid, str(Path(path).parent), ".".join(Path(path).name.split(".")[:2])) for pid, path in lines]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("big")
    write_run(root, drift(BIG | SMALL, base=torch.float32), base_shards=2)
    return root


@pytest.fixture(scope="module")
def expected(big: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the threads of one process write, cut at the same size."""
    out = tmp_path_factory.mktemp("expected")
    ask(big, out)
    return digests(out)


def test_one_process_at_a_time_writes_what_the_threads_of_one_process_write(
    big: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    ask(big, tmp_path / "out", spread=one_by_one)
    assert digests(tmp_path / "out") == expected


def test_four_processes_write_the_same_bytes_and_each_file_once(
    big: Path, expected: dict[str, str], tmp_path: Path
) -> None:
    begun = written_by_processes(big, tmp_path / "out", workers=4)
    assert digests(tmp_path / "out") == expected
    assert len({pid for pid, _, _ in begun}) == 4
    assert len(begun) == len(set(begun)) == sum(name.endswith(".safetensors") for name in expected)


@pytest.mark.parametrize("point", ["truncate", "rename"])
def test_a_worker_that_is_killed_in_the_middle_costs_its_shard_alone(
    big: Path, expected: dict[str, str], tmp_path: Path, point: str
) -> None:
    begun = written_by_processes(big, tmp_path / "out", workers=4, point=point)
    assert digests(tmp_path / "out") == expected
    assert not [name for name in tree(tmp_path / "out") if "tmp" in name or "partial" in name]
    twice = [each for place, each in enumerate(begun) if each[1:] in {other[1:] for other in begun[:place]}]
    assert twice
    assert {shard for _, _, shard in twice} == {sorted({shard for _, _, shard in begun})[1]}
    if point == "rename":
        # The output that had its file already does not get it a second time.
        assert len(twice) == len({out for _, out, _ in begun}) - 1


@given(shard_size=st.integers(1, 400_000))
@settings(deadline=None, max_examples=15)
def test_files_are_cut_in_the_order_of_the_base_and_none_is_larger_than_asked_for(
    tmp_path_factory: pytest.TempPathFactory, shard_size: int
) -> None:
    root = tmp_path_factory.mktemp("cut")
    trajectory = write_run(root, drift()).open()
    out = cut(trajectory, root / "out", shard_size, spread=one_by_one)
    whole = write(trajectory, predict(trajectory), root / "whole")
    assert load(out).keys() == load(whole).keys()
    assert all(torch.equal(tensor, load(whole)[name]) for name, tensor in load(out).items())
    files = sorted(file.name for file in out.glob("*.safetensors"))
    if files == [SINGLE_FILE]:
        assert content(out) == content(whole)
        return
    count = len(files)
    assert files == [f"model-{place:05}-of-{count:05}.safetensors" for place in range(1, count + 1)]
    weight_map = json.loads((out / INDEX_FILE).read_text())["weight_map"]
    places = [weight_map[spec.name] for spec in trajectory.tensors]
    assert places == sorted(places)
    sizes = {spec.name: spec.base.nbytes for spec in trajectory.tensors}
    held = {file: [sizes[name] for name in weight_map if weight_map[name] == file] for file in files}
    assert all(sum(inside) <= shard_size or len(inside) == 1 for inside in held.values())
    # None is cut off before it is full.
    firsts = {
        file: next(sizes[spec.name] for spec in trajectory.tensors if weight_map[spec.name] == file) for file in files
    }
    assert all(sum(held[file]) + firsts[after] > shard_size for file, after in itertools.pairwise(files))


def test_a_tensor_larger_than_a_shard_is_alone_in_one(big: Path, tmp_path: Path) -> None:
    out = cut(Run(big / "base", big / "run").open(), tmp_path / "out", SHARD_SIZE)
    weight_map = json.loads((out / INDEX_FILE).read_text())["weight_map"]
    large = "model.embed_tokens.weight"
    assert (out / weight_map[large]).stat().st_size > 2 * SHARD_SIZE
    assert [name for name, file in weight_map.items() if file == weight_map[large]] == [large]


def test_files_are_those_of_the_base_when_nothing_is_asked_for(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    out = cut(trajectory, tmp_path / "out", None, spread=one_by_one)
    assert content(out) == content(write(trajectory, predict(trajectory), tmp_path / "plain"))
    assert "shard_size" not in json.loads((out / "relex.json").read_text())


def test_what_was_cut_is_rebuilt_bit_for_bit(run: Run, tmp_path: Path) -> None:
    out = cut(run.open(), tmp_path / "out", 50_000)
    rebuild(out, tmp_path / "again", memory=64 * MIB, threads=1)
    assert content(tmp_path / "again") == content(out)
    assert manifest.read(tmp_path / "again") == manifest.read(out)
    assert manifest.verify(out).shard_size == 50_000


class LostError(Exception):
    """The process that hands shards out is lost."""


def test_shards_that_are_whole_are_kept_when_the_one_that_hands_them_out_is_lost(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    planned: list[Shard] = []

    def lost(shards: Sequence[Shard], on_progress: Progress | None) -> NoReturn:
        planned.extend(shards)
        write_shard(shards[0])
        raise LostError

    with pytest.raises(LostError):
        cut(trajectory, tmp_path / "out", 2000, spread=lost)
    (partial,) = tmp_path.glob(".out.*")
    # A worker of the lost one goes on.
    write_shard(planned[1])
    before = {file.name: file.stat().st_ino for file in partial.glob("*.safetensors")}
    assert set(before) == {planned[0].file, planned[1].file}
    again: list[str] = []

    def rest(shards: Sequence[Shard], on_progress: Progress | None) -> None:
        again.extend(shard.file for shard in shards)
        one_by_one(shards, on_progress)

    out = cut(trajectory, tmp_path / "out", 2000, spread=rest)
    assert again == [shard.file for shard in planned[2:]]
    assert {name: (out / name).stat().st_ino for name in before} == before
    assert content(out) == content(cut(trajectory, tmp_path / "whole", 2000))


def test_shards_of_another_cut_are_not_taken_for_one_s_own(tmp_path: Path) -> None:
    """Two cuts into as many files: the names are the same, and the tensors are not."""
    trajectory = write_run(tmp_path, drift({"a": (100,), "b": (50,), "c": (50,)})).open()

    def lost(shards: Sequence[Shard], on_progress: Progress | None) -> NoReturn:
        write_shard(shards[0])
        raise LostError

    with pytest.raises(LostError):
        cut(trajectory, tmp_path / "out", 240, spread=lost)
    out = cut(trajectory, tmp_path / "out", 300)
    other = cut(trajectory, tmp_path / "other", 240)
    assert len(list(out.glob("*.safetensors"))) == len(list(other.glob("*.safetensors"))) == 2
    assert all(torch.equal(tensor, load(other)[name]) for name, tensor in load(out).items())
    assert not list(tmp_path.glob(".out.*"))


def test_a_worker_taken_for_dead_that_goes_on_changes_nothing(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    late: list[Shard] = []

    def spread(shards: Sequence[Shard], on_progress: Progress | None) -> None:
        one_by_one(shards, on_progress)
        # It has begun, and another one was faster.
        (Path(shards[0].partials[0]) / f"{shards[0].file}.elsewhere-1.tmp").write_bytes(b"half")
        write_shard(shards[0])
        late.append(shards[0])

    out = cut(trajectory, tmp_path / "out", 2000, spread=spread)
    assert content(out) == content(cut(trajectory, tmp_path / "whole", 2000))
    before = digests(out)
    with pytest.raises(
        OutputError, match=r"is not there: nobody waits for model-00001-of-.* any more, or this machine"
    ):
        write_shard(late[0])
    assert digests(out) == before


@pytest.mark.parametrize("where", ["base", "run/checkpoint-25"])
def test_a_worker_refuses_inputs_that_are_not_those_of_the_plan_and_nothing_is_left(tmp_path: Path, where: str) -> None:
    trajectory = write_run(tmp_path, drift()).open()
    file = tmp_path / where / "model.safetensors"
    before = tree(tmp_path)

    def spread(shards: Sequence[Shard], on_progress: Progress | None) -> None:
        write_shard(shards[0])
        file.write_bytes(file.read_bytes())
        one_by_one(shards[1:], on_progress)

    with pytest.raises(
        CheckpointChangedError, match=r"of steps 10 to 75 is not what it was when model-00002-of-"
    ) as caught:
        cut(trajectory, tmp_path / "out", 2000, spread=spread)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before


def test_a_shard_that_leaves_the_range_of_its_precision_takes_back_all_of_them(tmp_path: Path) -> None:
    trajectory = write_run(tmp_path, drift(base=torch.float16, stored=torch.float16)).open()
    before = tree(tmp_path)
    with pytest.raises(NonFiniteError, match="leaves the range"):
        cut(trajectory, tmp_path / "out", 2000, spread=one_by_one, target=10**11)
    assert tree(tmp_path) == before


def test_a_budget_below_the_least_is_refused_by_the_worker(run: Run, tmp_path: Path) -> None:
    def spread(shards: Sequence[Shard], on_progress: Progress | None) -> None:
        one_by_one([replace(shard, memory=1 << 10) for shard in shards], on_progress)

    with pytest.raises(MemoryBudgetError, match="Give at least"):
        cut(run.open(), tmp_path / "out", 2000, spread=spread)
    assert not list(tmp_path.glob(".out.*"))
