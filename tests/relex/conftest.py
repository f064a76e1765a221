from pathlib import Path

import pytest

from tests.helpers.trajectories import Run, drift, write_run


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A bf16 run of five checkpoints at irregular steps: fresh, to be damaged at will."""
    return write_run(tmp_path, drift())
