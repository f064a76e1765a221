"""kill -9 anywhere in a prediction: nothing under the output's name, and the next call ends in the same bytes."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from relex.errors import OutputError
from relex.output import manifest
from relex.output.materialise import Output, materialise
from relex.trajectory import Trajectory
from tests.helpers import ROOT
from tests.helpers.trajectories import MIB, Run, content, drift, predict, tree, write, write_run

SHARDS = 3
# The shards get their names one after the other, the directory last.
POINTS = (
    "open-model-00002-of-00003.safetensors.tmp",
    "progress-1",
    *(f"rename-{number}" for number in range(1, SHARDS + 2)),
    "open-config.json",
    "open-relex.json",
)


@dataclass(frozen=True)
class Scene:
    """A sharded run, the uninterrupted prediction of it, and where the killed ones are."""

    run: Run
    whole: Path
    killed: Path


def _child(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name("dying_prediction.py")), *map(str, arguments)]


def _environment() -> Mapping[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def _again(trajectory: Trajectory, out: Path) -> list[tuple[int, int]]:
    seen: list[tuple[int, int]] = []
    outputs = [Output(predict(trajectory), out)]
    report = lambda done, total: seen.append((done, total))  # noqa: E731
    materialise(trajectory, outputs, memory=64 * MIB, threads=1, on_progress=report)
    return seen


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    root = tmp_path_factory.mktemp("killed")
    # Enough tensors in every shard that the first one gets its name before the last piece is done.
    run = write_run(root, drift({f"w{place:02}": (50,) for place in range(60)}), base_shards=SHARDS)
    whole = write(run.open(), predict(run.open()), root / "whole")
    done = subprocess.run(
        _child(root, root / "killed", *POINTS),
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=400,
    )
    assert done.stdout.splitlines() == [f"{point} -9" for point in POINTS], done.stderr
    return Scene(run, whole, root / "killed")


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_prediction_is_absent_and_the_next_call_finishes_it(scene: Scene, point: str) -> None:
    out = scene.killed / point
    assert not out.exists()
    (partial,) = scene.killed.glob(f".{point}.*.partial")
    finished = {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in partial.glob("*.safetensors")}
    if point.startswith("rename"):
        assert len(finished) == int(point[-1]) - 1
    trajectory = scene.run.open()
    seen = _again(trajectory, out)
    assert content(out) == content(scene.whole)
    manifest.verify(out)
    assert not partial.exists()
    # A shard that was whole is what it was: not one of its tensors is in the second pass.
    assert {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in finished} == finished
    assert (seen == []) is (len(finished) == SHARDS)


def test_nothing_hidden_is_left_when_all_is_done(scene: Scene, tmp_path: Path) -> None:
    """Another prediction of that name takes away what the killed one left."""
    subprocess.run(_child(scene.run.base.parent, tmp_path, "rename-2"), env=_environment(), check=True, timeout=400)
    assert len(list(tmp_path.glob(".rename-2.*.partial"))) == 1
    trajectory = scene.run.open()
    write(trajectory, predict(trajectory, target=300), tmp_path / "rename-2")
    assert {name for name in tree(tmp_path) if "/" not in name} == {"rename-2"}


def test_a_second_writer_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(
    scene: Scene, tmp_path: Path
) -> None:
    trajectory = scene.run.open()
    command = _child(scene.run.base.parent, tmp_path, "wait")
    with subprocess.Popen(command, env=_environment(), stdout=subprocess.PIPE, text=True) as first:
        try:
            assert first.stdout is not None
            assert first.stdout.readline() == "writing\n"
            before = tree(tmp_path)
            with pytest.raises(OutputError, match="is being written by another process") as caught:
                _again(trajectory, tmp_path / "wait")
            assert "\n" not in str(caught.value)
            assert tree(tmp_path) == before
        finally:
            first.kill()
    _again(trajectory, tmp_path / "wait")
    assert content(tmp_path / "wait") == content(scene.whole)
    assert {name for name in tree(tmp_path) if "/" not in name} == {"wait"}
