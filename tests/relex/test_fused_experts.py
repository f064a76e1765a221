"""Experts that are stored fused are predicted as if each matrix of each expert were a tensor of its own."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from relex.analysis import analyze_run
from relex.drift import drift as compare
from relex.extrapolation import Request, extrapolate
from relex.forecast import Forecast, forecast
from relex.gram import cached
from relex.gram import measure as take_gram
from relex.inspection import inspect
from relex.output.manifest import read
from relex.output.materialise import Output, materialise, rebuild
from relex.output.shards import Shard, write_shard
from relex.predictors import parse_method
from relex.progress import Progress
from relex.ranges import measure_range
from relex.trajectory import Trajectory, open_trajectory
from tests.helpers import dcp_files, fused, verl_files
from tests.helpers.fused import CONFIG, DOWN, EXPERTS, GATE_UP, INNER, LAYER, WIDTH
from tests.helpers.trajectories import (
    MIB,
    STEPS,
    TARGET,
    Run,
    drift,
    load,
    measure,
    write,
    write_model,
    write_run,
)
from tests.helpers.trajectories import predict as forecasts

METHODS = ("relex", "secant", "weight-extrapolation", "alpha-rl", "next:ahead=4,epochs=1")


def predict(run: Run, root: Path, *methods: str) -> dict[str, Forecast]:
    requests = [Request(parse_method(spec), TARGET, root / spec) for spec in methods]
    extrapolate(run.open(), requests, grams=root / "grams", memory=256 * MIB, threads=2)
    return {spec: read(root / spec).forecast for spec in methods}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same run with its experts apart, and fused."""
    root = tmp_path_factory.mktemp("experts")
    states = drift(fused.SHAPES)
    fused_states = {step: fused.fuse(state) for step, state in states.items()}
    return (
        write_run(root / "apart", states, config=CONFIG),
        write_run(root / "fused", fused_states, base_shards=2, config=CONFIG),
    )


def test_a_fused_model_is_predicted_as_the_one_that_is_stored_by_the_expert(
    both: tuple[Run, Run], tmp_path: Path
) -> None:
    apart, together = (predict(run, tmp_path / name, *METHODS) for run, name in zip(both, "ab", strict=True))
    for spec in METHODS:
        assert together[spec].tensors == apart[spec].tensors, spec
        assert set(together[spec].copied) == set(apart[spec].copied), spec
        ours, theirs = load(tmp_path / "b" / spec), load(tmp_path / "a" / spec)
        assert ours.keys() == load(both[1].base).keys()
        split = fused.unfuse(ours)
        assert split.keys() == theirs.keys()
        assert all(torch.equal(split[name], theirs[name]) for name in theirs), spec
    assert not any("experts" in name for spec in METHODS for name in together[spec].copied)


def sharded_by_expert(root: Path, states: dict[int, dict[str, Tensor]], _: pytest.MonkeyPatch) -> Run:
    return verl_files.write_run(root, states, config=CONFIG)


def sharded_inside(root: Path, states: dict[int, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(dcp_files, "SHARDED", {GATE_UP: 1, DOWN: 1})
    # The halves of three ranks are no halves of gate and up.
    run = dcp_files.write_dcp_run(root, states, world=3)
    write_model(run.base, states[0], config=CONFIG)
    return run


@pytest.mark.parametrize("written", [sharded_by_expert, sharded_inside])
def test_ranks_may_hold_some_experts_or_a_part_of_each(
    both: tuple[Run, Run],
    written: Callable[[Path, dict[int, dict[str, Tensor]], pytest.MonkeyPatch], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    states = {0: load(both[1].base)} | {step: load(both[1].run / f"checkpoint-{step}") for step in STEPS}
    run = written(tmp_path / "sharded", states, monkeypatch)
    pieces = {len(spec.entries[0].pieces) for spec in run.open().tensors if "experts" in spec.name}
    assert pieces == ({1} if written is sharded_by_expert else {2, 3})
    ours, theirs = (predict(each, tmp_path / name, "relex") for each, name in ((run, "a"), (both[1], "b")))
    assert ours["relex"].tensors == theirs["relex"].tensors
    assert load_bytes(tmp_path / "a" / "relex") == load_bytes(tmp_path / "b" / "relex")


def test_a_base_by_the_expert_has_checkpoints_that_are_fused(both: tuple[Run, Run], tmp_path: Path) -> None:
    """As transformers reads it from the Hub, and its trainers' ranks hold it."""
    states = {0: load(both[0].base)} | {step: load(both[1].run / f"checkpoint-{step}") for step in STEPS}
    run = verl_files.write_run(tmp_path / "run", states, config=CONFIG)
    ours, theirs = (predict(each, tmp_path / name, "relex") for each, name in ((run, "a"), (both[0], "b")))
    assert ours["relex"].tensors == theirs["relex"].tensors
    assert load_bytes(tmp_path / "a" / "relex") == load_bytes(tmp_path / "b" / "relex")


def load_bytes(model: Path) -> dict[str, bytes]:
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in load(model).items() if tensor.dim()}


def in_one(run: Run) -> Trajectory:
    """Open a run as an earlier version did, fused experts as one tensor each."""
    trajectory = run.open()
    return open_trajectory(trajectory.base, trajectory.checkpoints, whole=(GATE_UP, DOWN))


def test_a_gram_of_an_earlier_version_is_not_taken_for_one_of_the_experts(
    both: tuple[Run, Run], tmp_path: Path
) -> None:
    before = cached(in_one(both[1]), tmp_path, memory=64 * MIB, threads=2)
    assert GATE_UP in before.names
    now = cached(both[1].open(), tmp_path, memory=64 * MIB, threads=2)
    assert f"{LAYER}.experts.2.up_proj.weight" in now.names
    assert GATE_UP not in now.names
    assert torch.equal(now.products, measure(both[1].open()).products)


def test_a_prediction_of_an_earlier_version_is_rebuilt_and_compared_with_what_came(
    both: tuple[Run, Run], tmp_path: Path
) -> None:
    window = open_trajectory(in_one(both[1]).base, in_one(both[1]).checkpoints[:-1], whole=(GATE_UP, DOWN))
    old = {spec: write(window, forecasts(window, spec), tmp_path / spec) for spec in ("hold", "relex")}
    assert GATE_UP in read(old["relex"]).forecast.tensors
    rebuild(old["relex"], tmp_path / "again", memory=64 * MIB, threads=2)
    assert load_bytes(tmp_path / "again") == load_bytes(old["relex"])

    base, later = window.base, both[1].open().checkpoints[-1]
    found = compare(base, later, predicted=old["relex"], observed=old["hold"], memory=64 * MIB, threads=2)
    pair = [load(path) for path in (both[1].base, both[1].run / "checkpoint-75", old["relex"])]
    flat = [torch.cat([t.double().flatten() for _, t in sorted(one.items()) if t.is_floating_point()]) for one in pair]
    assert found.norm == pytest.approx(float((flat[1] - flat[0]).norm()))
    assert found.norm_ratio == pytest.approx(float((flat[2] - flat[0]).norm() / (flat[1] - flat[0]).norm()))


def test_other_processes_take_and_write_the_experts_too(both: tuple[Run, Run], tmp_path: Path) -> None:
    trajectory = both[1].open()
    gram = measure(trajectory)
    elsewhere = take_gram(trajectory, memory=64 * MIB, threads=1, share=lambda pieces: map(measure_range, pieces))
    assert torch.equal(elsewhere.products, gram.products)

    def spread(shards: Sequence[Shard], _: Progress | None) -> None:
        for shard in shards:
            write_shard(shard)

    made = Output(forecast(trajectory, gram, parse_method("relex"), target_step=TARGET), tmp_path / "spread")
    materialise(trajectory, [made], contents=gram.contents, memory=64 * MIB, threads=1, spread=spread)
    assert load_bytes(made.directory) == load_bytes(write(trajectory, made.forecast, tmp_path / "here"))


def test_an_inspection_and_an_analysis_name_every_expert(both: tuple[Run, Run], tmp_path: Path) -> None:
    found = inspect(both[1].run, both[1].base, grams=tmp_path, memory=64 * MIB, threads=2)
    assert f"{LAYER}.experts.1.gate_proj.weight" in found.by_tensor
    assert found.tensors == len(load(both[1].base))
    shown = analyze_run(both[1].run, both[1].base, grams=tmp_path, memory=64 * MIB, threads=2)
    modules = {part.module: part.tensors for part in shown.modules}
    assert {modules[f"mlp.experts.*.{name}_proj"] for name in ("gate", "up", "down")} == {EXPERTS}


def test_what_is_stored_turned_is_decomposed_the_right_way(tmp_path: Path) -> None:
    """Llama 4's (expert, in, out) gives AlphaRL what (out, in) does."""
    shapes = {f"{LAYER}.experts.{expert}.gate_up_proj.weight": (2 * INNER, WIDTH) for expert in range(EXPERTS)}
    states = drift(shapes, base=torch.float32, stored=torch.float32)
    turned = {
        step: {GATE_UP: torch.stack([state[name].T.contiguous() for name in shapes])} for step, state in states.items()
    }
    config = {"model_type": "llama4", "text_config": {"hidden_size": WIDTH, "num_local_experts": EXPERTS}}
    for name, each in (("apart", states), ("turned", turned)):
        predict(write_run(tmp_path / name, each, config=config), tmp_path / f"{name}-out", "alpha-rl")
    apart, ours = (load(tmp_path / name / "alpha-rl") for name in ("apart-out", "turned-out"))
    for expert, name in enumerate(shapes):
        torch.testing.assert_close(ours[GATE_UP][expert].T, apart[name], rtol=1e-5, atol=1e-5)
    assert {name for name in read(tmp_path / "turned-out" / "alpha-rl").forecast.tensors if "gate" in name} == set(
        shapes
    )
