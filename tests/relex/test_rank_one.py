"""Predictions of matrix methods, from the call to the directory and back."""

import io
import json
import zipfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from relex.errors import OutputError, TargetError
from relex.extrapolation import Request, extrapolate
from relex.forecast import Forecast
from relex.output import manifest
from relex.output.materialise import rebuild
from relex.predictors import parse_method
from relex.rank_one import FILE_NAME, RankOne, from_bytes, to_bytes
from tests.helpers import peft_files
from tests.helpers.trajectories import MIB, SHAPES, Run, content, drift, load, predict, write_run

NEXT = "next:ahead=2,epochs=3"


def run_methods(
    run: Run, root: Path, *specs: str, targets: tuple[int, ...] = (200,), memory: int = 64 * MIB, threads: int = 2
) -> tuple[list[Forecast], list[Path], list[tuple[int, int]]]:
    """Return the forecasts, the directories, and what was told about learning."""
    told: list[tuple[int, int]] = []

    def tell(what: str, done: int, total: int) -> None:
        if what == "learning":
            told.append((done, total))

    requests = [Request(parse_method(spec), target, root / f"{spec}-{target}") for spec in specs for target in targets]
    made = extrapolate(run.open(), requests, grams=root / "grams", memory=memory, threads=threads, tell=tell)
    return made, [request.directory for request in requests], told


def delta(directory: Path, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.double() - base[name].double() for name, each in load(directory).items() if name in SHAPES}


@pytest.fixture
def fine(tmp_path: Path) -> Run:
    return write_run(tmp_path / "fine", drift(base=torch.float32, stored=torch.float32))


@pytest.mark.parametrize("spec", ["alpha-rl", NEXT])
def test_a_prediction_is_rebuilt_bit_for_bit_from_its_manifest(run: Run, tmp_path: Path, spec: str) -> None:
    (made,), (out,), _ = run_methods(run, tmp_path, spec)
    rebuild(out, tmp_path / "again", memory=4 * MIB, threads=1)
    assert content(tmp_path / "again") == content(out)
    kept = manifest.verify(out)
    assert kept == manifest.read(tmp_path / "again")
    assert kept.forecast.digest == made.digest == kept.digest
    assert kept.files[FILE_NAME].sha256 == sha256((out / FILE_NAME).read_bytes()).hexdigest()
    assert "left" not in (out / "relex.json").read_text()


@pytest.mark.parametrize("damage", ["remove", "cut", "swap"])
def test_without_its_vectors_nothing_is_rebuilt(run: Run, tmp_path: Path, damage: str) -> None:
    _, (out, other), _ = run_methods(run, tmp_path, "alpha-rl", targets=(200, 300))
    file = out / FILE_NAME
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-100] if damage == "cut" else (other / FILE_NAME).read_bytes())
    with pytest.raises(
        OutputError, match=r"relex-vectors\.npz (cannot be read|holds vectors of 1 tensors that are not)"
    ):
        rebuild(out, tmp_path / "again", memory=64 * MIB, threads=1)
    assert not (tmp_path / "again").exists()


def test_vectors_are_the_same_bytes_whenever_they_are_written() -> None:
    vectors = {
        "b": RankOne(np.ones(3, np.float32), np.zeros(2, np.float32), 0.1),
        "a": RankOne(*np.eye(2, dtype=np.float32)),
    }
    written = to_bytes(vectors)
    assert to_bytes(dict(reversed(vectors.items()))) == written
    with zipfile.ZipFile(io.BytesIO(written)) as file:
        assert {entry.date_time for entry in file.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    back = from_bytes(written)
    assert {name: (each.digest, each.inner) for name, each in back.items()} == {
        name: (each.digest, each.inner) for name, each in vectors.items()
    }


@pytest.mark.parametrize("spec", ["alpha-rl", NEXT])
def test_the_bytes_do_not_depend_on_memory_threads_or_company(run: Run, tmp_path: Path, spec: str) -> None:
    _, (alone,), _ = run_methods(run, tmp_path / "alone", spec, memory=512 * MIB, threads=1)
    _, together, _ = run_methods(run, tmp_path / "together", "relex", spec, "hold", targets=(150, 200))
    assert content(together[3]) == content(alone)


def test_the_norm_is_that_of_the_delta_that_is_written(fine: Run, tmp_path: Path) -> None:
    base = load(fine.base)
    for made, out in zip(
        *run_methods(fine, tmp_path, "alpha-rl", NEXT, "next:ahead=2,alpha=40,epochs=3")[:2], strict=True
    ):
        expected = sum(float(each.square().sum()) for each in delta(out, base).values()) ** 0.5
        assert made.norm == pytest.approx(expected, rel=1e-4), made.method


def test_several_targets_take_one_pass(run: Run, tmp_path: Path) -> None:
    _, _, one = run_methods(run, tmp_path / "one", "alpha-rl")
    forecasts, _, three = run_methods(run, tmp_path / "three", "alpha-rl", targets=(100, 200, 300))
    assert one == three
    assert len({made.digest for made in forecasts}) == 3


def test_all_alphas_share_one_training_and_later_ones_too(run: Run, tmp_path: Path) -> None:
    _, _, one = run_methods(run, tmp_path / "one", NEXT)
    _, _, several = run_methods(run, tmp_path, NEXT, f"{NEXT},alpha=0.5", f"{NEXT},alpha=2.5", targets=(200, 300))
    assert one == several
    _, (later,), told = run_methods(run, tmp_path, f"{NEXT},alpha=1")
    assert told == []
    _, (afresh,), _ = run_methods(run, tmp_path / "afresh", f"{NEXT},alpha=1")
    assert content(later) == content(afresh)


def test_kept_vectors_that_were_torn_are_found_anew(run: Run, tmp_path: Path) -> None:
    _, (out,), _ = run_methods(run, tmp_path, "alpha-rl")
    for file in (tmp_path / "grams").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-100])
    request = Request(parse_method("alpha-rl"), 200, tmp_path / "again")
    extrapolate(run.open(), [request], grams=tmp_path / "grams", memory=64 * MIB, threads=2)
    assert content(tmp_path / "again") == content(out)


def test_kept_vectors_of_another_run_are_not_taken(run: Run, tmp_path: Path) -> None:
    run_methods(run, tmp_path, "alpha-rl")
    other = write_run(tmp_path / "other", drift(seed=1))
    requests = [Request(parse_method("alpha-rl"), 200, tmp_path / name) for name in ("found", "expected")]
    for request, grams in zip(requests, ("grams", "elsewhere"), strict=True):
        extrapolate(other.open(), [request], grams=tmp_path / grams, memory=64 * MIB, threads=2)
    assert content(tmp_path / "found") == content(tmp_path / "expected")


def test_other_vectors_are_another_prediction_although_the_method_has_the_same_name(run: Run, tmp_path: Path) -> None:
    digests = set()
    for last in (0.5, 0.6):
        (tmp_path / "measured.json").write_text(json.dumps({10: 0.1, 20: 0.2, 25: 0.25, 40: 0.4, 75: last}))
        spec = f"alpha-rl:accuracies={tmp_path / 'measured.json'},goal=0.9"
        request = Request(parse_method(spec), 200, tmp_path / str(last))
        (made,) = extrapolate(run.open(), [request], grams=tmp_path / "grams", memory=64 * MIB, threads=1)
        assert manifest.read(request.directory).forecast.description == made.description
        digests.add(made.digest)
    assert len(digests) == 2


def test_grams_alone_are_not_enough_and_the_refusal_says_so(run: Run) -> None:
    with pytest.raises(TargetError, match="method alpha-rl follows from the matrices themselves"):
        predict(run.open(), "alpha-rl")


def test_a_model_without_such_matrices_is_refused_by_name(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", drift({"encoder.w": (9, 9)}))
    with pytest.raises(
        TargetError, match=r"method alpha-rl predicts none of this model's 3 tensors, such as position_ids"
    ):
        run_methods(run, tmp_path, "alpha-rl")


def test_an_adapter_cannot_hold_it(tmp_path: Path) -> None:
    run = peft_files.write_run(tmp_path / "run")
    request = Request(parse_method("alpha-rl"), 200, tmp_path / "out")
    with pytest.raises(TargetError, match=r"--adapter: what alpha-rl predicts is no combination of adapters"):
        extrapolate(run.open(), [request], grams=tmp_path, memory=64 * MIB, threads=1, form="adapter")


def test_a_run_that_never_moved_is_predicted_as_its_base(tmp_path: Path) -> None:
    states = drift({"mlp.frozen.weight": (4, 4), "mlp.w": (4, 4)})
    for state in states.values():
        state["mlp.w"] = states[0]["mlp.w"]
        state["mlp.frozen.weight"] = states[0]["mlp.frozen.weight"]
    run = write_run(tmp_path / "run", states)
    for made in run_methods(run, tmp_path, "alpha-rl", NEXT)[0]:
        assert {made.tensors[name].source for name in ("mlp.w", "mlp.frozen.weight")} == {"base"}
        assert made.norm == 0.0
