"""The best observed checkpoint so far: the one version of `<name>-observed`, with the alias best-observed.

No gate has judged it, so that it is no candidate; `relex register` makes it one. A better one takes its place, and the
files of the former one go, unless they are a candidate's too.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import registry
from deploy.reaper import directory_of
from deploy.registry import Registered
from deploy.tracking import connect, locked_experiment, refusals
from deploy.versions import CANDIDATES, DIGEST, MODEL_ID, OBSERVED, alias_version, known_version, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

BEST = "best-observed"


def best_digest(name: str, *, tracking_uri: str) -> str | None:
    """Return the digest of the best observed checkpoint, None where there is none yet."""
    client = connect(tracking_uri)
    with refusals(client):
        version = alias_version(client, f"{name}{OBSERVED}", BEST)
        return None if version is None else version.tags.get(DIGEST)


def keep_best(
    model: Path, *, name: str, tracking_uri: str, metrics: Mapping[str, float], tags: Mapping[str, str]
) -> Registered:
    """Verify the model directory, and make it the version that has the alias, and the only one.

    Raises as `registry.register` does.
    """
    done = registry.register(
        model,
        name=name,
        tracking_uri=tracking_uri,
        metrics=metrics,
        tags=tags,
        description="The best observed checkpoint so far, by its score on selection problems. No gate has judged it.",
        shelf=OBSERVED,
    )
    client = connect(tracking_uri)
    with locked_experiment(client, name):
        client.set_registered_model_alias(done.name, BEST, str(done.version))
        for former in list(versions(client, f"name = '{done.name}'")):
            if int(former.version) != done.version:
                _forget(client, name, former)
    return done


def _forget(client: "MlflowClient", name: str, former: "ModelVersion") -> None:
    digest = former.tags[DIGEST]
    alone = all(known_version(client, each, digest) is None for each in (name, f"{name}{CANDIDATES}"))
    if alone:
        # The files first: killed here, the next call finds the version and goes on.
        directory = directory_of(client.get_logged_model(former.tags[MODEL_ID]))
        if directory is not None:
            shutil.rmtree(directory, ignore_errors=True)
    client.delete_model_version(former.name, str(former.version))
    if alone:
        client.delete_logged_model(former.tags[MODEL_ID])
