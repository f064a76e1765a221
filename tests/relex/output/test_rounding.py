"""What survives the rounding of a prediction: the arithmetic, the warning, and what the manifest says."""

from pathlib import Path

import pytest
import torch

from relex.extrapolation import Request, extrapolate
from relex.forecast import Forecast
from relex.output import manifest
from relex.predictors import parse_method
from tests.helpers.trajectories import MIB, write_run

STEPS = (10, 20, 25, 40, 75)


def written(tmp_path: Path, rms: float, *, dtype: str | None = None, spec: str = "raw") -> Forecast:
    """Predict step 150 of a run whose delta is then of `rms`, on a bf16 base of entries of .02."""
    generator = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(300, 200, generator=generator)).bfloat16()
    way = torch.randn(300, 200, generator=generator)
    states = {0: {"weight": base}} | {step: {"weight": base.float() + rms * step / 150 * way} for step in STEPS}
    request = Request(parse_method(spec), 150, tmp_path / "out")
    grams = tmp_path / "grams"
    (made,) = extrapolate(
        write_run(tmp_path, states).open(), [request], grams=grams, memory=64 * MIB, threads=2, dtype=dtype
    )
    stored = manifest.read(request.directory).forecast
    assert stored == made
    return stored


@pytest.mark.parametrize(("rms", "share"), [(1e-6, 0.03), (1e-5, 0.28), (3e-5, 0.69), (1e-4, 0.99)])
def test_a_bf16_base_keeps_a_share_of_a_delta_that_grows_with_it(tmp_path: Path, rms: float, share: float) -> None:
    made = written(tmp_path, rms)
    assert made.surviving == pytest.approx(share, abs=0.02)
    said = [text for text in made.warnings if "survives rounding to the stored precision" in text]
    assert len(said) == (share < 0.9)
    assert not said or f"raw @ 150: {100 * (made.surviving or 0):.0f} % of what it adds to the base" in said[0]


def test_the_last_observed_copy_loses_too_and_float32_keeps_all(tmp_path: Path) -> None:
    assert (written(tmp_path / "copy", 1e-5, spec="hold").surviving or 1.0) < 0.3
    fine = written(tmp_path / "fine", 1e-5, dtype="float32")
    assert (fine.surviving, fine.dtype) == (None, "float32")
    assert not any("rounding" in text for text in fine.warnings)
