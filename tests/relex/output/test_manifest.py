import json
from pathlib import Path

import pytest

from relex.errors import OutputError
from relex.output import manifest
from relex.output.materialise import Output, materialise
from tests.helpers.trajectories import MIB, STEPS, Run, predict


@pytest.fixture
def out(run: Run, tmp_path: Path) -> Path:
    trajectory = run.open()
    outputs = [Output(predict(trajectory), tmp_path / "out")]
    materialise(trajectory, outputs, memory=64 * MIB, threads=1, command=["relex", "extrapolate"])
    return tmp_path / "out"


def test_the_manifest_says_what_was_predicted_from_what(run: Run, out: Path) -> None:
    stored = manifest.verify(out)
    assert stored.forecast == predict(run.open())
    assert stored.digest == stored.forecast.digest
    assert stored.base == str(run.base)
    assert stored.checkpoints == tuple(str(run.run / f"checkpoint-{step}") for step in STEPS)
    assert stored.command == ("relex", "extrapolate")
    assert stored.versions.keys() == {"relex", "torch", "safetensors", "python"}
    assert stored.files.keys() == {file.name for file in out.iterdir()} - {"relex.json"}
    head = json.loads((out / "relex.json").read_text())
    assert (head["target_step"], head["window"], head["method"]["name"]) == (200, list(STEPS), "relex")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_bit_is_noticed(out: Path, name: str) -> None:
    content = bytearray((out / name).read_bytes())
    content[-1] ^= 1
    (out / name).write_bytes(content)
    with pytest.raises(
        OutputError, match=rf"{name} has {len(content)} bytes, sha256 .*; the manifest says {len(content)}"
    ):
        manifest.verify(out)


def test_a_missing_file_is_noticed(out: Path) -> None:
    (out / "model.safetensors").unlink()
    with pytest.raises(OutputError, match=r"model.safetensors is missing; the manifest lists it with \d+ bytes"):
        manifest.verify(out)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "digest": "", "forecast": []}']
)
def test_what_is_no_manifest_is_refused(out: Path, content: str) -> None:
    (out / "relex.json").write_text(content)
    with pytest.raises(OutputError, match=r"relex\.json is no manifest of relex"):
        manifest.read(out)


def test_a_forecast_of_another_make_is_refused(out: Path) -> None:
    content = json.loads((out / "relex.json").read_text())
    content["forecast"]["tensors"] = []
    (out / "relex.json").write_text(json.dumps(content))
    with pytest.raises(OutputError, match="no manifest of relex"):
        manifest.read(out)


def test_a_manifest_of_another_format_is_refused_with_both(out: Path) -> None:
    (out / "relex.json").write_text('{"format": 99}')
    with pytest.raises(OutputError, match="has format 99, this relex reads 1"):
        manifest.read(out)


def test_a_directory_without_a_manifest_is_not_ours(run: Run) -> None:
    with pytest.raises(OutputError, match=r"base has no relex.json: relex did not write it"):
        manifest.read(run.base)
