"""The MLflow server as an app, of the store that the variables of `mlflow server` name."""

import os

from starlette.types import ASGIApp


def create() -> ASGIApp:
    """Return what `mlflow server --no-serve-artifacts` serves; fails at once on a database that is none of MLflow's."""
    # Given like this to the workers of `mlflow server`, and read while the app is imported.
    os.environ["_MLFLOW_SERVER_FILE_STORE"] = os.environ["MLFLOW_BACKEND_STORE_URI"]
    os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"]
    from mlflow.server.fastapi_app import app
    from mlflow.server.handlers import initialize_backend_stores

    initialize_backend_stores(os.environ["MLFLOW_BACKEND_STORE_URI"], None, os.environ["MLFLOW_DEFAULT_ARTIFACT_ROOT"])
    made: ASGIApp = app
    return made
