"""A tiny checkpoint store and the settings that watch it."""

from functools import partial
from pathlib import Path

import pytest

from tests.helpers import straight_run
from tests.helpers.straight_run import WriteCheckpoint


@pytest.fixture
def write_checkpoint(tmp_path: Path) -> WriteCheckpoint:
    return partial(straight_run.write_checkpoint, tmp_path)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return straight_run.write_config(tmp_path)
