"""A registry of its own for each test, copied from one that was set up once."""

from pathlib import Path

import pytest

from deploy.tracking import prepare
from tests.helpers.registry import Registry


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare(tmp_path_factory.mktemp("template")).database


@pytest.fixture
def store(tmp_path: Path, template: Path) -> Registry:
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "mlflow.db").write_bytes(template.read_bytes())
    return Registry(tmp_path, prepare(tmp_path / "mlflow").tracking_uri)
