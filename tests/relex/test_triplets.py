"""Leading singular triplets of differences, read from checkpoints on disk."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from relex.errors import MemoryBudgetError
from relex.streaming import UNIT
from relex.triplets import Source, Triplets, triplets
from tests.helpers.trajectories import MIB, STEPS, Run, drift, load, write_run

Array = NDArray[np.float64]

SHAPES = {"tall": (1025, 1031), "small": (300, 20), "wide": (40, 700), "narrow": (3, 9000), "vector": (77,)}
PAIRS = [(0, None), (4, None), (4, 3), (2, 0), (1, 1)]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Run:
    assert UNIT < 1025 * 1031
    return write_run(tmp_path_factory.mktemp("leading"), drift(SHAPES, base=torch.float32), shards=2)


def triplets_of(run: Run, *, memory: int = 256 * MIB, threads: int = 2) -> dict[str, Triplets]:
    return dict(triplets(Source(run.open(), tuple(SHAPES), memory, threads), PAIRS))


def differences(run: Run, name: str) -> list[Array]:
    base = load(run.base)[name].to(torch.bfloat16).double().numpy()
    states = [load(run.run / f"checkpoint-{step}")[name].double().numpy() for step in STEPS]
    states = [state.reshape(len(state), -1) for state in states]
    return [
        states[later] - (base.reshape(states[0].shape) if earlier is None else states[earlier])
        for later, earlier in PAIRS
    ]


def test_the_triplets_are_those_of_a_full_decomposition(big: Run) -> None:
    for name, each in triplets_of(big).items():
        for place, matrix in enumerate(differences(big, name)):
            left, sigma, right = each.left_PM[place], each.sigma_P[place], each.right_PN[place]
            assert each.norm_P[place] == pytest.approx(np.linalg.norm(matrix), rel=1e-12)
            if not matrix.any():
                assert not left.any()
                assert not right.any()
                assert sigma == 0.0
                continue
            U, S, V = np.linalg.svd(matrix, full_matrices=False)
            assert sigma == pytest.approx(S[0], rel=1e-10)
            np.testing.assert_allclose(np.outer(left, right), np.outer(U[:, 0], V[0]), atol=1e-7)


def test_the_bits_do_not_depend_on_memory_or_threads(big: Run) -> None:
    expected = triplets_of(big)
    for memory, threads in ((64 * MIB, 1), (1024 * MIB, 3)):
        for name, each in triplets_of(big, memory=memory, threads=threads).items():
            for field in ("left_PM", "sigma_P", "right_PN", "norm_P"):
                assert np.array_equal(getattr(each, field), getattr(expected[name], field)), (name, field)


def test_a_matrix_that_does_not_fit_is_refused_with_what_would_do(big: Run) -> None:
    with pytest.raises(
        MemoryBudgetError, match=r"--memory 4 MiB is below the \d+ MiB .* Give at least (\d+)MiB"
    ) as caught:
        triplets_of(big, memory=4 * MIB)
    least = int(str(caught.value).rpartition("at least ")[2].removesuffix("MiB."))
    assert 8 < least < 12  # the largest matrix takes 8 MiB in fp64
    triplets_of(big, memory=least * MIB)


def test_tiny_differences_are_as_exact_as_large_ones(tmp_path: Path) -> None:
    states = drift({"w": (90, 60)}, base=torch.float64, stored=torch.float64)
    scale = 2.0**-40
    for step, state in states.items():
        state["w"] = scale * (state["w"] - states[0]["w"]) if step else state["w"]
    states[0]["w"] = torch.zeros_like(states[0]["w"])
    run = write_run(tmp_path, states)
    ((_, entry),) = triplets(Source(run.open(), ("w",), 64 * MIB, 1), [(4, None)])
    U, S, V = np.linalg.svd(states[75]["w"].numpy())
    assert entry.sigma_P[0] == pytest.approx(S[0], rel=1e-10)
    np.testing.assert_allclose(np.outer(entry.left_PM[0], entry.right_PN[0]), np.outer(U[:, 0], V[0]), atol=1e-7)
