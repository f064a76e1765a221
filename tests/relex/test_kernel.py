"""The loops in C: against exact products, and against what torch makes of the same numbers."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from relex import gram, kernel
from relex.errors import CheckpointDamagedError, NonFiniteError
from relex.forecast import TensorForecast
from relex.gram import Gram
from relex.kernel import FEWEST, Rows
from relex.output.combine import predicted
from relex.output.manifest import read
from relex.predictors import parse_method
from relex.predictors.predictor import Window
from relex.streaming import CHUNK
from relex.trajectory import open_trajectory
from tests.helpers.trajectories import (
    MIB,
    Run,
    drift,
    least_memory,
    load,
    measure,
    predict,
    write,
    write_model,
    write_run,
)

pytestmark = pytest.mark.skipif(not kernel.BUILT, reason="the loops in C were not built here")

N = FEWEST + 1234
TARGET = 500


def _walk(count: int, *, step: float, noise: float, moved: float = 1.0, seed: int = 0) -> Tensor:
    """Return (1 + count, N) fp32: a base of a model's size, and a drift with noise that moves a share of it."""
    generator = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(N, generator=generator)
    drift = step * torch.randn(N, generator=generator) * (torch.rand(N, generator=generator) < moved)
    rows = [base + k * drift + noise * torch.randn(N, generator=generator) for k in range(1, count + 1)]
    return torch.stack([base, *rows])


def _with_outlier(rows: Tensor) -> Tensor:
    rows[1:, 7] += 3.0 * torch.arange(1, len(rows))
    return rows


def _in_c(rows: Tensor) -> Tensor:
    """Return the Gram of deltas by the loops in C."""
    count = len(rows) - 1
    total, scratch = (
        torch.zeros(count, count, dtype=torch.float64),
        torch.zeros(kernel.scratch(count), dtype=torch.uint8),
    )
    kernel.gram(Rows(rows[0], rows[1:]), rows[0], first=0, total=total, scratch=scratch)
    lower = total.tril()
    return (lower + lower.tril(-1).mT).cumsum(0).cumsum(1)


def _coefficients(gram_KK: Tensor) -> Tensor:
    steps_K = torch.arange(10.0, 10.0 * len(gram_KK) + 10.0, 10.0, dtype=torch.float64)
    return parse_method("relex").predictor.coefficients(Window(gram_KK, steps_K), TARGET)


@pytest.mark.parametrize(
    ("rows", "dtype", "bound"),
    [
        pytest.param(_walk(75, step=1e-6, noise=1e-5), torch.bfloat16, 1e-8, id="75 of bf16"),
        pytest.param(_walk(20, step=1e-6, noise=0.0, moved=0.16), torch.bfloat16, 1e-8, id="tiny updates"),
        pytest.param(_walk(20, step=1e-3, noise=1e-3), torch.bfloat16, 1e-8, id="large updates"),
        pytest.param(_with_outlier(_walk(20, step=1e-6, noise=1e-5)), torch.bfloat16, 1e-8, id="an outlier"),
        pytest.param(_walk(20, step=1e-25, noise=0.0) * 1e-18, torch.bfloat16, 1e-8, id="below the range"),
        pytest.param(_walk(40, step=1e-6, noise=1e-8), torch.float32, 1e-7, id="nearly parallel fp32"),
        pytest.param(_walk(7, step=1e-6, noise=1e-5) * 1e22, torch.float32, 1e-7, id="beyond the range"),
    ],
)
def test_products_and_coefficients_are_the_exact_ones(rows: Tensor, dtype: torch.dtype, bound: float) -> None:
    stored = rows.to(dtype)
    # Differences of what is stored are exact in fp64, and its sums err in the thirteenth digit.
    deltas = stored[1:].double() - stored[0].double()
    exact, ours = deltas @ deltas.mT, _in_c(stored)
    norms = exact.diagonal().sqrt()
    assert float(((ours - exact).abs() / (norms[:, None] * norms)).nan_to_num().max()) < bound
    wanted, made = _coefficients(exact), _coefficients(ours)
    assert float((made - wanted).norm() / wanted.norm()) < 5e-9
    total = (deltas.float() * wanted.float()[:, None]).sum(0)
    again = (deltas.float() * made.float()[:, None]).sum(0)
    base = stored[0].float()
    assert int(((total + base).bfloat16() != (again + base).bfloat16()).sum()) == 0


@pytest.fixture
def other_loops() -> Iterator[str]:
    """The loops of an older CPU of this kind."""
    from relex import _kernel

    taken = _kernel.use("")
    other = _kernel.use("avx2" if taken == "avx512" else taken)
    if other == taken:
        pytest.skip("this CPU has one kind of loops")
    yield other
    _kernel.use("")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loops_of_an_older_cpu_give_the_same_bits(other_loops: str, dtype: torch.dtype) -> None:
    rows = _with_outlier(_walk(11, step=1e-6, noise=1e-5)).to(dtype)
    there = _in_c(rows), _sum(rows, [0.5 - k for k in range(11)], dtype)
    from relex import _kernel

    _kernel.use("")
    here = _in_c(rows), _sum(rows, [0.5 - k for k in range(11)], dtype)
    assert torch.equal(here[0], there[0])
    assert torch.equal(here[1], there[1])


def test_a_product_does_not_depend_on_what_else_is_multiplied() -> None:
    rows = _with_outlier(_walk(23, step=1e-6, noise=1e-5)).bfloat16()
    whole = _in_c(rows)
    for count in (2, 5, 6, 11, 22):
        assert torch.equal(_in_c(rows[: 1 + count]), whole[:count, :count]), count


def _sum(rows: Tensor, values: list[float], out: torch.dtype) -> Tensor:
    made = torch.empty(rows.shape[1], dtype=out)
    assert kernel.combine(Rows(rows[0], rows[1:]), rows[0], coefficients=torch.tensor(values), out=made)
    return made


@pytest.mark.parametrize("out", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prediction_has_the_bits_that_torch_gives_it(dtype: torch.dtype, out: torch.dtype) -> None:
    if "FMA" not in torch.backends.cpu.get_cpu_capability() and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch rounds twice on this CPU")
    rows = _walk(12, step=1e-6, noise=1e-5)[:, : CHUNK + 77].contiguous().to(dtype)
    values = [0.3 * (-1.7) ** k if k % 4 else 0.0 for k in range(12)]
    forecast = TensorForecast("combined", tuple(values))
    deltas = rows[1:].float() - rows[0].float()
    by_torch = predicted(forecast, range(12), rows[0], stored=None, deltas=deltas).to(out)
    assert torch.equal(_sum(rows, values, out), by_torch)


def test_a_sum_beyond_the_range_is_said_to_be_so() -> None:
    rows = torch.full((3, 100), 3e38)
    rows[1:] *= 0.5
    out = torch.empty(100)
    assert not kernel.combine(Rows(rows[0], rows[1:]), rows[0], coefficients=torch.tensor([9.0, -9.5]), out=out)


def test_what_has_gaps_or_no_room_is_refused_before_it_is_read() -> None:
    rows, total, scratch = torch.zeros(4, 100), torch.zeros(3, 3, dtype=torch.float64), torch.zeros(1 << 20)
    with pytest.raises(ValueError, match="100 elements do not lie side by side"):
        kernel.gram(Rows(rows[0, :50], rows[1:]), rows[0], first=0, total=total, scratch=scratch)
    with pytest.raises(ValueError, match="50 elements do not lie side by side"):
        kernel.combine(Rows(None, rows[1:, ::2]), rows[0], coefficients=torch.ones(3), out=torch.empty(50))
    with pytest.raises(ValueError, match="no room for the products of 3 rows"):
        kernel.gram(Rows(rows[0], rows[1:]), rows[0], first=0, total=total, scratch=scratch[:10])


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One tensor of more than a unit's elements, and one that is multiplied in fp64."""
    states = drift({"w": (1025, 1031), "v": (9,)}, steps=(10, 20, 25, 40, 75, 90))
    return write_run(tmp_path_factory.mktemp("large"), states)


def _same(left: Gram, right: Gram) -> bool:
    return torch.equal(left.products, right.products) and torch.equal(left.base_norms, right.base_norms)


def test_memory_threads_and_an_extension_change_no_bit(large: Run) -> None:
    trajectory = large.open()
    whole = measure(trajectory)
    assert whole.precision == "fp32"
    assert _same(gram.measure(trajectory, memory=least_memory(trajectory), threads=1), whole)
    first = measure(open_trajectory(trajectory.base, trajectory.checkpoints[:4]))
    assert _same(first, whole.rows(range(4)))
    assert _same(gram.measure(trajectory, memory=64 * MIB, threads=2, known=first), whole)


@pytest.mark.parametrize("stored", [torch.float16, torch.float32])
def test_what_has_to_be_converted_is_multiplied_too(tmp_path: Path, stored: torch.dtype) -> None:
    states = drift({"w": (513, 523)}, steps=(10, 20, 25), base=torch.bfloat16, stored=stored)
    measured = measure(write_run(tmp_path, states).open())
    rows = torch.stack([states[step]["w"].double().view(-1) for step in (0, 10, 20, 25)])
    torch.testing.assert_close(measured.of("w"), (rows[1:] - rows[0]) @ (rows[1:] - rows[0]).mT, rtol=1e-7, atol=0.0)
    assert measured.precision == "fp32"


def test_without_them_the_prediction_is_the_same_and_the_manifest_says_how_it_was_made(
    large: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = large.open()
    quick, ours = measure(trajectory), predict(trajectory)
    write(trajectory, ours, tmp_path / "in C")
    monkeypatch.setattr(kernel, "BUILT", False)
    slow, theirs = measure(trajectory), predict(trajectory)
    assert slow.precision == "fp64"
    torch.testing.assert_close(quick.products, slow.products, rtol=1e-8, atol=1e-8 * float(slow.products.max()))
    # The sum has the same bits; coefficients may differ behind the eighth digit.
    write(trajectory, ours, tmp_path / "in torch")
    write(trajectory, theirs, tmp_path / "from fp64")
    made = [load(tmp_path / name) for name in ("in C", "in torch", "from fp64")]
    assert all(torch.equal(made[0][name], other[name]) for other in made[1:] for name in made[0])
    precisions = [read(tmp_path / name).forecast.products for name in ("in C", "in torch", "from fp64")]
    assert precisions == ["fp32", "fp32", "fp64"]


def test_what_was_taken_in_another_precision_is_not_extended(
    large: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory = large.open()
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "BUILT", False)
        gram.cached(large.open(window=40), tmp_path, memory=64 * MIB, threads=2)
    assert _same(gram.cached(trajectory, tmp_path, memory=64 * MIB, threads=2), measure(trajectory))
    assert len(list(tmp_path.iterdir())) == 1
    # What covers everything is taken as it is, however it was made.
    with monkeypatch.context() as patched:
        patched.setattr(kernel, "BUILT", False)
        assert gram.cached(trajectory, tmp_path, memory=64 * MIB, threads=2).precision == "fp32"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_is_refused_by_tensor_and_step(large: Run, tmp_path: Path, value: float) -> None:
    run = _copied(large, tmp_path)
    state = load(run.run / "checkpoint-25")
    state["w"][-1, -1] = value
    write_model(run.run / "checkpoint-25", state)
    with pytest.raises(NonFiniteError, match="w holds NaN or infinity at step 25"):
        measure(run.open())


@pytest.mark.parametrize("begin", [0, 700_160])
def test_a_lost_sector_is_refused(large: Run, tmp_path: Path, begin: int) -> None:
    run = _copied(large, tmp_path)
    state = load(run.run / "checkpoint-40")
    state["w"].view(-1)[begin : begin + 256] = 0.0
    write_model(run.run / "checkpoint-40", state)
    with pytest.raises(CheckpointDamagedError, match="a stretch of w is all zeros at step 40"):
        measure(run.open())


def _copied(run: Run, root: Path) -> Run:
    other = Run(root / "base", root / "run")
    write_model(other.base, load(run.base))
    other.run.mkdir()
    for path in run.run.iterdir():
        write_model(other.run / path.name, load(path))
    return other
