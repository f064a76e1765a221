import errno
import json
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from relex import gram
from relex.errors import CheckpointChangedError, NonFiniteError, OutputError
from relex.forecast import Forecast, forecast
from relex.output import manifest
from relex.output.materialise import Output, materialise, rebuild
from relex.predictors import parse_method
from relex.streaming import CHUNK, UNIT
from relex.trajectory import Trajectory
from tests.helpers.trajectories import (
    FROZEN,
    MIB,
    Run,
    content,
    drift,
    least_memory,
    load,
    measure,
    predict,
    tree,
    write,
    write_model,
    write_run,
)

# Two tensors longer than a unit; none a multiple of a chunk.
BIG = {"embed": (1025, 1031), "wide": (3, 700_001), "norm": (8,), "scale": ()}
TARGETS = (100, 200, 300, 400)
LEAST = -1


def _write_all(
    trajectory: Trajectory, forecasts: Mapping[str, Forecast], out: Path, *, memory: int, threads: int
) -> None:
    outputs = [Output(made, out / name) for name, made in forecasts.items()]
    materialise(trajectory, outputs, memory=memory, threads=threads)


def _digests(out: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


@pytest.fixture(scope="module", params=[("bfloat16", "bfloat16"), ("float32", "bfloat16")], ids="-".join)
def big(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trajectory:
    assert all(torch.Size(shape).numel() % CHUNK for shape in BIG.values())
    assert torch.Size(BIG["embed"]).numel() > UNIT
    base, stored = (getattr(torch, name) for name in request.param)
    return write_run(tmp_path_factory.mktemp("big"), drift(BIG, base=base, stored=stored), base_shards=2).open()


@pytest.fixture(scope="module")
def expected(big: Trajectory, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """The bytes of each target when it is asked for alone, with all the memory there is and one thread."""
    out = tmp_path_factory.mktemp("expected")
    measured = gram.measure(big, memory=4096 * MIB, threads=1)
    digests = {}
    for target in TARGETS:
        made = forecast(big, measured, parse_method("relex:rank=2"), target_step=target)
        _write_all(big, {str(target): made}, out, memory=4096 * MIB, threads=1)
        digests[target] = _digests(out / str(target))
    return digests


@pytest.mark.parametrize(("memory", "threads"), [(64 * MIB, 1), (64 * MIB, 2), (4096 * MIB, 2), (LEAST, 1)])
def test_the_bytes_depend_on_nothing_but_the_input(
    big: Trajectory, expected: dict[int, dict[str, str]], tmp_path: Path, memory: int, threads: int
) -> None:
    if memory == LEAST:
        memory = least_memory(big)
        assert memory < 8 * MIB
    measured = gram.measure(big, memory=memory, threads=threads)
    made = {
        str(target): forecast(big, measured, parse_method("relex:rank=2"), target_step=target) for target in TARGETS
    }
    _write_all(big, made, tmp_path, memory=memory, threads=threads)
    assert {target: _digests(tmp_path / str(target)) for target in TARGETS} == expected


def test_other_methods_in_the_same_pass_change_nothing(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    specs = ("first-update:alpha=3", "relex", "hold", "weight-extrapolation:start=20", "mean:last=2")
    forecasts = {spec: predict(trajectory, spec) for spec in specs}
    _write_all(trajectory, forecasts, tmp_path / "together", memory=64 * MIB, threads=2)
    for spec, made in forecasts.items():
        alone = write(trajectory, made, tmp_path / "alone" / spec)
        assert content(alone) == content(tmp_path / "together" / spec), spec


def test_a_prediction_is_rounded_once_to_the_dtype_of_the_base(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    measured = measure(trajectory)
    method = parse_method("relex")
    fine = forecast(trajectory, measured, method, target_step=200, dtype="float32")
    _write_all(trajectory, {"fine": fine, "plain": predict(trajectory)}, tmp_path, memory=64 * MIB, threads=1)
    wide, narrow = load(tmp_path / "fine"), load(tmp_path / "plain")
    for name, tensor in narrow.items():
        assert torch.equal(tensor, wide[name].to(tensor.dtype)), name
        assert wide[name].dtype is (torch.float32 if tensor.is_floating_point() else tensor.dtype)
    assert json.loads((tmp_path / "fine" / "config.json").read_text())["dtype"] == "float32"
    assert (tmp_path / "plain" / "config.json").read_bytes() == (run.base / "config.json").read_bytes()


def test_hold_is_the_latest_checkpoint_to_the_byte(run: Run, tmp_path: Path) -> None:
    latest = content(run.run / "checkpoint-75")
    trajectory = run.open()
    for spec in ("hold", "mean:last=1", "relex-pinned:damping=0", "weight-extrapolation:start=0"):
        target = 75 if spec.startswith("weight") else 200
        assert content(write(trajectory, predict(trajectory, spec, target=target), tmp_path / spec)) == latest


def test_the_base_gives_its_files_and_the_latest_checkpoint_what_is_missing(run: Run, tmp_path: Path) -> None:
    (run.base / "generation_config.json").write_text('{"of": "base"}')
    (run.base / "modeling_custom.py").write_text("raise SystemExit")
    latest = run.run / "checkpoint-75"
    (latest / "generation_config.json").write_text('{"of": "checkpoint"}')
    (latest / "tokenizer_config.json").write_text("{}")
    (latest / "chat_template.jinja").write_text("{{ messages }}")
    for name in ("optimizer.pt", "rng_state.pth", "training_args.bin"):
        (latest / name).write_bytes(b"")
    trajectory = run.open()
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors",
        "relex.json",
    }  # fmt: skip
    assert (out / "generation_config.json").read_text() == '{"of": "base"}'


@given(base_shards=st.integers(1, 7), shards=st.integers(1, 7))
@settings(deadline=None, max_examples=10)
def test_the_number_of_shards_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory, base_shards: int, shards: int
) -> None:
    root = tmp_path_factory.mktemp("shards")
    states = drift()
    whole = write_run(root / "whole", states).open()
    dealt = write_run(root / "dealt", states, base_shards=base_shards, shards=shards).open()
    one = load(write(whole, predict(whole), root / "one"))
    other = load(write(dealt, predict(dealt), root / "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(list((root / "other").glob("*.safetensors"))) == base_shards


@given(st.permutations(["a", "b", "c", "d", "e"]))
@settings(deadline=None, max_examples=8)
def test_the_names_of_tensors_do_not_matter(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Safetensors files are in the order of the names, so other names are another order of the bytes."""
    root = tmp_path_factory.mktemp("names")
    shapes = {"a": (9,), "b": (131, 97), "c": (3, 5), "d": (), "e": (8200,)}
    renamed = dict(zip(shapes, names, strict=True))
    states = drift(shapes)
    one = write_run(root / "one", states).open()
    other = write_run(
        root / "other",
        {step: {renamed.get(name, name): tensor for name, tensor in state.items()} for step, state in states.items()},
    ).open()
    first, second = load(write(one, predict(one), root / "1")), load(write(other, predict(other), root / "2"))
    assert all(torch.equal(first[name], second[renamed[name]]) for name in shapes)


@given(scale=st.sampled_from([1e-6, 1e-3, 1.0]), dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
@settings(deadline=None, max_examples=9)
def test_a_frozen_tensor_stays_frozen(
    tmp_path_factory: pytest.TempPathFactory, scale: float, dtype: torch.dtype
) -> None:
    root = tmp_path_factory.mktemp("frozen")
    states = drift({FROZEN: (300,), "w": (300,)}, base=torch.float32, stored=dtype)
    # Finer than the checkpoints can store: their copy differs from the base, by rounding and not by training.
    origin = scale * torch.randn(300, generator=torch.Generator().manual_seed(1))
    for step, state in states.items():
        state[FROZEN] = origin.to(dtype) if step else origin
    trajectory = write_run(root, states).open()
    for spec in ("relex", "raw", "expo", "hold"):
        assert torch.equal(load(write(trajectory, predict(trajectory, spec), root / spec))[FROZEN], origin)


@pytest.mark.parametrize("shards", [1, 4], ids=["beside others", "alone in its file"])
def test_an_empty_tensor_stays_empty(tmp_path: Path, shards: int) -> None:
    trajectory = write_run(tmp_path, drift({"empty": (0, 4), "w": (3,)}), base_shards=shards).open()
    assert load(write(trajectory, predict(trajectory), tmp_path / "out"))["empty"].shape == (0, 4)


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_output_that_exists_is_refused_and_untouched(
    run: Run, tmp_path: Path, make: Callable[[Path], object]
) -> None:
    trajectory = run.open()
    make(tmp_path / "out")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"output .*/out exists and holds something relex did not write"):
        write(trajectory, predict(trajectory), tmp_path / "out")
    assert tree(tmp_path) == before


def test_another_prediction_is_refused_with_both_names_and_the_same_one_is_no_work(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    first, second = predict(trajectory), predict(trajectory, target=201)
    out = write(trajectory, first, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
    write(trajectory, first, out)
    message = f"holds the prediction {first.digest[:12]}…, not {second.digest[:12]}…"
    with pytest.raises(OutputError, match=message):
        write(trajectory, second, out)
    assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == before


def test_an_output_that_is_refused_takes_back_the_others_of_the_same_call(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    (tmp_path / "second").mkdir()
    before = tree(tmp_path)
    outputs = [Output(predict(trajectory), tmp_path / name) for name in ("first", "second")]
    with pytest.raises(OutputError, match="second exists"):
        materialise(trajectory, outputs, memory=64 * MIB, threads=1)
    assert tree(tmp_path) == before


def test_one_directory_cannot_become_two_predictions(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    before = tree(tmp_path)
    outputs = [Output(predict(trajectory), tmp_path / "out")] * 2
    with pytest.raises(OutputError, match="is being written"):
        materialise(trajectory, outputs, memory=64 * MIB, threads=1)
    assert tree(tmp_path) == before


def test_of_two_predictions_for_one_directory_the_first_to_finish_has_it(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    slow, fast = predict(trajectory), predict(trajectory, target=300)
    out = tmp_path / "out"

    def overtake(done: int, total: int) -> None:
        if not out.exists():
            write(trajectory, fast, out)
            assert (
                len(list(tmp_path.glob(".out.*.partial"))) == 1
            )  # the slow one is alive, and not taken for a leftover

    with pytest.raises(OutputError, match="out appeared while it was being written"):
        materialise(trajectory, [Output(slow, out)], memory=64 * MIB, threads=1, on_progress=overtake)
    assert manifest.verify(out).digest == fast.digest
    assert not list(tmp_path.glob(".out.*"))


def test_an_output_below_a_file_is_refused(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"output .*/file/out cannot be made: "):
        write(trajectory, predict(trajectory), tmp_path / "file" / "out")


@pytest.mark.parametrize("where", ["base", "run/checkpoint-25"])
@pytest.mark.parametrize("damage", ["cut", "rewrite", "remove"])
def test_an_input_that_changes_meanwhile_leaves_no_output(tmp_path: Path, where: str, damage: str) -> None:
    run = write_run(tmp_path, drift({f"w{place:02}": (50,) for place in range(40)}), base_shards=3)
    trajectory = run.open()
    made = predict(trajectory)
    before = tree(tmp_path)
    file = sorted((tmp_path / where).glob("*.safetensors"))[-1]
    damaged = False

    def on_progress(done: int, total: int) -> None:
        nonlocal damaged
        if damaged:
            return
        damaged = True
        if damage == "cut":
            os.truncate(file, 1000)
        elif damage == "remove":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes())

    with pytest.raises(CheckpointChangedError, match=where) as caught:
        materialise(trajectory, [Output(made, tmp_path / "out")], memory=64 * MIB, threads=2, on_progress=on_progress)
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == before - ({str(file.relative_to(tmp_path))} if damage == "remove" else set())


def test_a_prediction_is_rebuilt_bit_for_bit_from_its_manifest(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    out = write(trajectory, predict(trajectory, "relex-pinned:damping=0.3,rank=2"), tmp_path / "out")
    rebuild(out, tmp_path / "again", memory=4 * MIB, threads=1)
    assert content(tmp_path / "again") == content(out)
    assert manifest.read(tmp_path / "again") == manifest.read(out)


@pytest.mark.parametrize("where", ["base", "run/checkpoint-10"])
def test_a_tampered_input_rebuilds_nothing(run: Run, tmp_path: Path, where: str) -> None:
    trajectory = run.open()
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    state = load(tmp_path / where)
    state["scale"] += 1
    write_model(tmp_path / where, state)
    before = tree(tmp_path)
    message = r"out/model.safetensors comes out with .* bytes, sha256 .* and was .*: a checkpoint or the base is not"
    with pytest.raises(OutputError, match=message):
        rebuild(out, tmp_path / "again", memory=64 * MIB, threads=1)
    assert tree(tmp_path) == before


def test_a_rebuild_over_something_is_refused(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    with pytest.raises(OutputError, match="exists; to rebuild"):
        rebuild(out, out, memory=64 * MIB, threads=1)


def test_progress_counts_every_element_once(run: Run, tmp_path: Path) -> None:
    trajectory = run.open()
    seen: list[tuple[int, int]] = []
    materialise(
        trajectory,
        [Output(predict(trajectory), tmp_path / "out")],
        memory=64 * MIB,
        threads=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    count = sum(tensor.numel() for tensor in load(run.base).values())
    assert seen[-1] == (count, count)
    assert seen == sorted(seen)


def test_a_copy_that_leaves_the_range_of_a_narrower_precision_is_refused(tmp_path: Path) -> None:
    states = drift(base=torch.float32, stored=torch.float32)
    for state in states.values():
        state[FROZEN] = torch.full_like(state[FROZEN], 7e4)
    trajectory = write_run(tmp_path, states).open()
    made = forecast(trajectory, measure(trajectory), parse_method("hold"), target_step=100, dtype="float16")
    with pytest.raises(NonFiniteError, match=rf"{FROZEN} predicted .* leaves the range of torch\.float16"):
        write(trajectory, made, tmp_path / "out")


def test_a_prediction_that_leaves_the_range_of_its_precision_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path, drift(base=torch.float16, stored=torch.float16))
    trajectory = run.open()
    before = tree(tmp_path)
    with pytest.raises(
        NonFiniteError, match=r"predicted at step 100000000000 by relex leaves the range of torch.float16"
    ):
        write(trajectory, predict(trajectory, target=10**11), tmp_path / "new" / "out")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("function", ["pwrite", "truncate", "fsync"])
def test_a_full_disk_is_one_line_with_the_room_that_is_needed_and_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    trajectory = run.open()
    made = predict(trajectory)
    before = tree(tmp_path)
    real = getattr(os, function)
    calls = iter(range(1000))

    def full(*args: Any) -> Any:
        if next(calls) >= 1 or function != "pwrite":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    monkeypatch.setattr(os, function, full)
    out = tmp_path / "predictions" / "out"
    said = rf"{out} takes \d+ bytes, and {out.parent} has room for \d+ \(No space left on device\)\. Make room"
    with pytest.raises(OutputError, match=said):
        write(trajectory, made, out)
    assert tree(tmp_path) == before
