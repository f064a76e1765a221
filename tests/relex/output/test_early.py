"""What is written while the Gram is taken is what is written after it, to the byte; what goes wrong leaves nothing."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relex import gram
from relex.contents import SecondReading
from relex.errors import CheckpointDamagedError, DuplicateError, NonFiniteError, RelexError
from relex.extrapolation import Request, extrapolate
from relex.forecast import Forecast, forecast, of_tensor
from relex.output import early, materialise, shards
from relex.output.materialise import Output
from relex.output.writer import ModelWriter
from relex.predictors import METHODS, parse_method
from relex.streaming import Block, Unit, Workspace, single_threaded, units
from tests.helpers import ROOT
from tests.helpers.trajectories import (
    MIB,
    STEPS,
    TARGET,
    Run,
    content,
    drift,
    least_memory,
    measure,
    predict,
    tree,
    write_run,
)

# More tensors than a group of matrices has, the later ones of several units.
SHAPES: Mapping[str, tuple[int, ...]] = {
    **{f"a{place:02}.weight": (7, 9) for place in range(11)},
    "a11.norm.weight": (9,),
    "frozen.weight": (16, 5),
    "x.weight": (1025, 1031),
    "y.weight": (1030, 1021),
}
_GIVEN = {"mean": "mean:last=2", "first-update": "first-update:alpha=2", "travel": "travel:lr=1e-5"}
_SPECS = [_GIVEN.get(name, name) for name in METHODS if name not in ("alpha-rl", "next")] + ["relex:rank=2"]
LINEAR = [spec for spec in _SPECS if parse_method(spec).predictor.by_tensor]


def ask(
    run: Run,
    out: Path,
    *methods: str,
    target: int = TARGET,
    memory: int = 64 * MIB,
    threads: int = 1,
    grams: str = "grams",
    **how: Any,
) -> list[Forecast]:
    """Ask for predictions into out/METHOD, with the Grams beside."""
    requests = [Request(parse_method(spec), target, out / spec.replace(":", "-")) for spec in methods or ("relex",)]
    return extrapolate(run.open(), requests, grams=out.parent / grams, memory=memory, threads=threads, **how)


def two_passes(run: Run, out: Path, method: str = "relex", *, target: int = TARGET, **how: Any) -> dict[str, bytes]:
    """Write a prediction after the Gram is taken and return its files."""
    made = predict(run.open(), method, target=target)
    materialise.materialise(run.open(), [Output(made, out)], memory=64 * MIB, threads=2, **how)
    return content(out)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return write_run(tmp_path_factory.mktemp("early"), drift(SHAPES), base_shards=2)


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The shards that were left to be written, output by output."""
    left: list[list[str]] = []

    def fill(trajectory: Any, forecasts: Any, writers: Mapping[int, ModelWriter], **how: Any) -> None:
        left.extend(writer.missing for writer in writers.values())
        shards.fill(trajectory, forecasts, writers, **how)

    monkeypatch.setattr(materialise, "fill", fill)
    return left


def target_of(method: str) -> int:
    return STEPS[2] if method == "reconstruct" else TARGET


@pytest.mark.parametrize("method", LINEAR)
def test_tensor_by_tensor_a_forecast_has_the_same_bits(run: Run, method: str) -> None:
    trajectory, products = run.open(), measure(run.open())
    made = forecast(trajectory, products, parse_method(method), target_step=target_of(method))
    for spec in trajectory.tensors:
        with single_threaded():
            products_KK = products.of(spec.name) if spec.moves else None
            alone = of_tensor(parse_method(method), trajectory.steps, target_of(method), spec, products_KK)
        whole = made.tensors[spec.name]
        assert (alone.source, alone.coefficients) == (whole.source, whole.coefficients), spec.name


def test_linear_methods_are_written_early_but_for_curves_and_the_network() -> None:
    late = {spec for spec in _SPECS if not parse_method(spec).predictor.by_tensor}
    assert late == {"polynomial", "sinusoid", "neural"}
    assert not parse_method("travel").predictor.by_tensor


@pytest.mark.parametrize(
    ("methods", "how"),
    [
        (("relex", "secant", "hold", "weight-extrapolation"), {"threads": 1}),
        (("relex", "saturating", "relex:rank=2"), {"threads": 2}),
        (("relex",), {"threads": 2, "shard_size": 100_000}),
        (("relex", "secant"), {"threads": 2, "dtype": "float32"}),
    ],
)
def test_the_bytes_are_those_of_two_passes(
    run: Run,
    tmp_path: Path,
    filled: list[list[str]],
    methods: Sequence[str],
    how: Mapping[str, Any],
) -> None:
    told: list[tuple[str, int, int]] = []
    made = ask(run, tmp_path / "out", *methods, tell=lambda *one: told.append(one), **how)
    # Nothing was left for a second pass.
    assert filled == [[] for _ in methods]
    assert [one for one in told if one[0] == "writing"] == [("writing", len(methods), len(methods))]
    for method, forecasted in zip(methods, made, strict=True):
        after = tmp_path / "after" / method
        outputs = [Output(forecasted, after)]
        materialise.materialise(run.open(), outputs, memory=64 * MIB, threads=1, shard_size=how.get("shard_size"))
        assert content(tmp_path / "out" / method.replace(":", "-")) == content(after)
    assert {name for name in tree(tmp_path / "out") if name.startswith(".")} == set()
    # A second call finds all of it.
    filled.clear()
    ask(run, tmp_path / "out", *methods, grams="others", **how)
    assert filled == []


def test_the_least_memory_is_enough(run: Run, tmp_path: Path, filled: list[list[str]]) -> None:
    ask(run, tmp_path / "out", memory=least_memory(run.open()))
    assert filled == [[]]
    assert content(tmp_path / "out" / "relex") == two_passes(run, tmp_path / "after")


@pytest.mark.parametrize("window", [40, 25])
def test_an_extended_gram_is_combined_as_it_comes(
    run: Run, tmp_path: Path, filled: list[list[str]], window: int
) -> None:
    gram.cached(run.open(window=window), tmp_path / "grams", memory=64 * MIB, threads=1)
    ask(run, tmp_path / "out")
    assert filled == [[]]
    assert content(tmp_path / "out" / "relex") == two_passes(run, tmp_path / "after")


def test_a_tensor_is_read_again_before_much_else_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: list[Unit] = []
    second: dict[Unit, int] = {}
    blocks, again = Workspace.blocks, SecondReading.blocks

    def read(space: Workspace, trajectory: Any, unit: Unit, rows: Sequence[int]) -> Iterator[Block]:
        if unit not in first:
            first.append(unit)
        return blocks(space, trajectory, unit, rows)

    def read_again(reading: SecondReading, space: Workspace, unit: Unit, rows: Sequence[int]) -> Iterator[Block]:
        second.setdefault(unit, len(first))
        return again(reading, space, unit, rows)

    monkeypatch.setattr(Workspace, "blocks", read)
    monkeypatch.setattr(SecondReading, "blocks", read_again)
    # So that a tensor is more than what is read ahead.
    monkeypatch.setattr("relex.streaming.UNIT", 1 << 15)
    ask(run, tmp_path / "out")
    pieces = units(run.open())
    assert second.keys() == set(pieces)
    for unit in pieces:
        ended = max(place for place, other in enumerate(first) if other.tensor == unit.tensor)
        # Of one thread: what was begun already, at most five units.
        assert second[unit] <= ended + 1 + 5
    # And a tensor's last unit first.
    names = [spec.name for spec in run.open().tensors]
    order = [unit.start for unit in second if names[unit.tensor] == "y.weight"]
    assert len(order) > 10
    assert order == sorted(order, reverse=True)


def changed(states: dict[int, dict[str, torch.Tensor]], case: str) -> dict[int, dict[str, torch.Tensor]]:
    """Do to the last tensor, when all others are written already, what is noticed at the end."""
    tensor = states[40]["y.weight"]
    if case == "duplicate":
        states[40] = dict(states[25])
    elif case == "zeros":
        tensor.view(-1)[-700:] = 0.0
    else:
        tensor.view(-1)[-1] = float(case)
    return states


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("duplicate", DuplicateError, "step 40 holds the same weights as that of step 25"),
        ("zeros", CheckpointDamagedError, "a stretch of y.weight is all zeros at step 40"),
        ("nan", NonFiniteError, "y.weight holds NaN or infinity at step 40"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_damaged_leaves_nothing_and_is_said_before_what_leaves_the_range(
    tmp_path: Path, case: str, error: type[RelexError], message: str, threads: int
) -> None:
    run = write_run(tmp_path / "in", changed(drift(SHAPES), case), base_shards=2)
    (tmp_path / "out").mkdir()
    for target in (TARGET, 10**7):
        with pytest.raises(error, match=message):
            ask(run, tmp_path / "out" / "new", target=target, threads=threads, dtype="float16", grams="../grams")
        assert tree(tmp_path / "out") == set()


def test_what_leaves_the_range_leaves_nothing_but_the_gram(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(NonFiniteError, match=r"predicted at step 10000000 by relex leaves the range of torch.float16"):
        ask(run, tmp_path / "out" / "new", target=10**7, dtype="float16", grams="../grams")
    assert tree(tmp_path / "out") == set()
    assert len(list((tmp_path / "grams").iterdir())) == 1


def test_a_file_that_is_written_again_meanwhile_is_noticed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "in", drift(SHAPES))
    file = run.run / "checkpoint-75" / "model.safetensors"
    before = file.stat()

    def rewrite(what: str, done: int, total: int) -> None:
        if what == "reading" and done == total:
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))

    (tmp_path / "out").mkdir()
    with pytest.raises(RelexError, match="changed while it was read"):
        ask(run, tmp_path / "out" / "new", tell=rewrite, grams="../grams")
    assert tree(tmp_path / "out") == set()


def test_other_bytes_the_second_time_are_noticed(
    run: Run, tmp_path: Path, filled: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written from them is discarded, and the pass that follows finds the right ones."""
    compare, seen = SecondReading._compare, 0

    def once(reading: SecondReading, unit: Unit, row: int, digest: bytes) -> None:
        nonlocal seen
        seen += 1
        compare(reading, unit, row, bytes(16) if seen == 20 else digest)

    monkeypatch.setattr(SecondReading, "_compare", once)
    ask(run, tmp_path / "out")
    assert [len(left) for left in filled] == [2]
    assert content(tmp_path / "out" / "relex") == two_passes(run, tmp_path / "after")


def test_a_tensor_that_the_forecast_makes_otherwise_is_written_again(
    run: Run, tmp_path: Path, filled: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:

    def other(method: Any, steps: Any, target_step: int, spec: Any, products_KK: Any) -> Any:
        made = of_tensor(method, steps, target_step, spec, products_KK)
        if spec.name != "x.weight":
            return made
        return replace(made, coefficients=(*made.coefficients[:-1], made.coefficients[-1] * (1 + 1e-15)))

    monkeypatch.setattr(early, "of_tensor", other)
    ask(run, tmp_path / "out")
    assert [len(left) for left in filled] == [1]
    assert content(tmp_path / "out" / "relex") == two_passes(run, tmp_path / "after")


_CHILD = """
import os, signal, sys
from pathlib import Path
from relex.extrapolation import Request, extrapolate
from relex.predictors import parse_method
from tests.helpers.trajectories import MIB, Run
root, out, which = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
renamings = 0
def hook(event, arguments):
    global renamings
    if event == "os.rename" and str(arguments[0]).startswith(str(out)):
        renamings += 1
        if renamings == which:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
request = Request(parse_method("relex"), 200, out / "relex")
extrapolate(Run(root / "base", root / "run").open(), [request], grams=out.parent / "grams", memory=64 * MIB, threads=1)
"""


@pytest.mark.parametrize(
    ("rename", "left"),
    [
        pytest.param(2, 0, id="while reading"),
        pytest.param(3, 2, id="before it has its name"),
        pytest.param(4, 0, id="before the directory has its name"),
    ],
)
def test_a_killed_call_is_gone_on_with_once_its_prediction_is_known(
    run: Run, tmp_path: Path, filled: list[list[str]], rename: int, left: int
) -> None:
    """The renamings: of two shards, of the hidden directory, and of it to the output."""
    killed = subprocess.run(
        [sys.executable, "-c", _CHILD, run.base.parent, tmp_path / "out", str(rename)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=400,
    )
    assert killed.returncode == -9
    (hidden,) = (tmp_path / "out").iterdir()
    assert len(list(hidden.glob("*.safetensors"))) == min(rename - 1, 2)
    for file in hidden.glob("*.safetensors"):
        # What is gone on with was whole; what is not must not be looked at.
        assert hidden.name != ".relex.early.partial" or file.write_bytes(b"other") == 5
    ask(run, tmp_path / "out")
    assert [len(each) for each in filled] == [left]
    assert content(tmp_path / "out" / "relex") == two_passes(run, tmp_path / "after")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"relex"}


def test_a_second_writer_does_not_touch_what_the_first_has_begun(run: Run, tmp_path: Path) -> None:
    seen = []

    def meanwhile(what: str, done: int, total: int) -> None:
        if what == "reading" and done == total:
            hidden = tmp_path / "out" / ".relex.early.partial"
            before = tree(hidden)
            with pytest.raises(RelexError, match="other process"):
                ask(run, tmp_path / "out", grams="others")
            seen.append(tree(hidden) == before)

    ask(run, tmp_path / "out", tell=meanwhile)
    assert seen == [True]
    assert content(tmp_path / "out" / "relex") == two_passes(run, tmp_path / "after")
