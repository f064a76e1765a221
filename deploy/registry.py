"""The model registry: every registered prediction in `<name>-candidates`, the promoted ones in `<name>`.

One registered version is one digest: it holds the verified files as hard links, and registering it again, from another
process or after a crash at any point, ends in the same single version.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import artifact
from deploy.candidate import Candidate, verify
from deploy.runs import log_artifacts, log_metrics, open_run
from deploy.store import connect, local_path, locked_experiment, page, refusals

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
_DIGEST = "relex.digest"
_STEP = "relex.target_step"
_MODEL_ID = "relex.logged_model_id"
# MLflow's pages find the versions of a LoggedModel through this tag; a server sets it, the bare database does not.
_VERSIONS_TAG = "mlflow.modelVersions"


@dataclass(frozen=True)
class Registered:
    """One registered version; `weights` is a plain from_pretrained directory, `created` is False if it was there."""

    name: str
    version: int
    model_uri: str
    logged_model_id: str
    run_id: str
    digest: str
    weights: Path
    url: str | None
    created: bool


@dataclass(frozen=True)
class RegisteredModelVersion:
    """A row of the registry: what was predicted, the caller's tags, and where the weights lie (a path or a URI)."""

    name: str
    version: int
    digest: str
    target_step: int
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    weights: str
    logged_model_id: str
    run_id: str
    created_ms: int
    champion: bool


def register(
    model: Path,
    *,
    name: str,
    tracking_uri: str,
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    artifacts: Sequence[Path] = (),
) -> Registered:
    """Verify the model directory and return its one version in `<name>-candidates`.

    `run_id` is the decision it comes from (`runs.record`); without one the digest gets a run of its own. Metrics are
    logged on the run and the model, tags on the version, artifacts beside the run; what the first registration logged
    stands. Damaged registered files are put right. `weights` are the registry's own files, or `model` itself where
    artifacts are remote. Refuses with CandidateError, DigestConflictError or RegistryError.
    """
    candidate = verify(model)
    client = connect(tracking_uri)
    registered = f"{name}-candidates"
    with locked_experiment(client, name) as experiment:
        version = _known_version(client, registered, candidate.digest)
        created = version is None
        if version is None:
            logged = _logged_model(client, experiment, candidate, run_id=run_id)
            weights = _store(client, candidate, logged)
            _log(client, logged, metrics=metrics or {}, artifacts=artifacts)
            version = _create_version(client, registered, candidate, logged, tags=tags or {})
        else:
            logged = client.get_logged_model(version.tags[_MODEL_ID])
            weights = _store(client, candidate, logged)
        _link_back(client, logged, version)
    return Registered(
        name=registered,
        version=int(version.version),
        model_uri=f"models:/{registered}/{version.version}",
        logged_model_id=logged.model_id,
        run_id=str(logged.source_run_id),
        digest=candidate.digest,
        weights=weights,
        url=page(tracking_uri, f"models/{registered}/versions/{version.version}"),
        created=created,
    )


def models(name: str, *, tracking_uri: str) -> list[RegisteredModelVersion]:
    """Return every registered prediction of `name`, newest first; empty where there is none."""
    client = connect(tracking_uri)
    with refusals(client):
        promoted = _champion(client, name)
        digest = None if promoted is None else promoted.tags.get(_DIGEST)
        versions = _versions(client, f"name = '{name}-candidates'")
        rows = [_row(client, version, champion=version.tags[_DIGEST] == digest) for version in versions]
    return sorted(rows, key=lambda row: row.version, reverse=True)


def champion(name: str, *, tracking_uri: str) -> RegisteredModelVersion | None:
    """Return the version of `<name>` that carries the alias champion, or None where nothing was promoted."""
    client = connect(tracking_uri)
    with refusals(client):
        version = _champion(client, name)
        return None if version is None else _row(client, version, champion=True)


def _known_version(client: "MlflowClient", registered: str, digest: str) -> "ModelVersion | None":
    return next(_versions(client, f"name = '{registered}' and tags.`{_DIGEST}` = '{digest}'"), None)


def _versions(client: "MlflowClient", filter_string: str) -> Iterator["ModelVersion"]:
    token = None
    while True:
        page = client.search_model_versions(filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _logged_model(
    client: "MlflowClient", experiment: "Experiment", candidate: Candidate, *, run_id: str | None
) -> "LoggedModel":
    found = client.search_logged_models(
        [experiment.experiment_id], filter_string=f"tags.`{_DIGEST}` = '{candidate.digest}'", max_results=1
    )
    if found:
        return found[0]
    title = f"step-{candidate.target_step}"
    if run_id is None:
        run_id = open_run(client, experiment, key=f"digest {candidate.digest}", title=title, tags={}).info.run_id
    # Created together with its digest, so that a crash right after leaves a model the next call finds.
    return client.create_logged_model(
        experiment.experiment_id,
        name=title,
        source_run_id=run_id,
        tags={_DIGEST: candidate.digest},
        params={"target_step": str(candidate.target_step), **_method(candidate)},
        model_type="prediction",
    )


def _store(client: "MlflowClient", candidate: Candidate, logged: "LoggedModel") -> Path:
    directory = local_path(logged.artifact_location)
    if directory is not None:
        artifact.build(candidate, directory, model_id=logged.model_id, created_ms=logged.creation_timestamp)
    elif logged.status != "READY":
        artifact.upload(candidate, client, model_id=logged.model_id, created_ms=logged.creation_timestamp)
    if logged.status != "READY":
        client.finalize_logged_model(logged.model_id, "READY")
    return candidate.path if directory is None else directory / artifact.MODEL


def _log(
    client: "MlflowClient", logged: "LoggedModel", *, metrics: Mapping[str, float], artifacts: Sequence[Path]
) -> None:
    run = client.get_run(str(logged.source_run_id))
    log_metrics(client, run, metrics, model_id=logged.model_id)
    log_artifacts(client, run, artifacts)
    if run.info.status != "FINISHED":
        client.set_terminated(run.info.run_id, "FINISHED")


def _method(candidate: Candidate) -> dict[str, str]:
    method = candidate.manifest.get("method")
    scalars = method.items() if isinstance(method, dict) else [("name", method)]
    return {f"method.{key}": str(value) for key, value in scalars if isinstance(value, str | int | float | bool)}


def _create_version(
    client: "MlflowClient", registered: str, candidate: Candidate, logged: "LoggedModel", *, tags: Mapping[str, str]
) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(registered)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    # The source is the artifact location and not models:/m-…: the database resolves that one through the process-wide
    # tracking URI, which belongs to the caller.
    return client.create_model_version(
        registered,
        source=logged.artifact_location,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        tags={
            **tags,
            _DIGEST: candidate.digest,
            _STEP: str(candidate.target_step),
            _MODEL_ID: logged.model_id,
        },
    )


def _link_back(client: "MlflowClient", logged: "LoggedModel", version: "ModelVersion") -> None:
    link = {"name": version.name, "version": int(version.version)}
    links = json.loads(client.get_logged_model(logged.model_id).tags.get(_VERSIONS_TAG, "[]"))
    if link not in links:
        client.set_logged_model_tags(logged.model_id, {_VERSIONS_TAG: json.dumps([*links, link])})


def _champion(client: "MlflowClient", name: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        # The registered model, or the alias on it, does not exist yet.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def _row(client: "MlflowClient", version: "ModelVersion", *, champion: bool) -> RegisteredModelVersion:
    location = client.get_model_version_download_uri(version.name, version.version)
    run = client.get_run(str(version.run_id))
    return RegisteredModelVersion(
        name=version.name,
        version=int(version.version),
        digest=version.tags[_DIGEST],
        target_step=int(version.tags[_STEP]),
        tags={key: value for key, value in version.tags.items() if not key.startswith("relex.")},
        metrics=dict(run.data.metrics),
        weights=f"{location}/{artifact.MODEL}",
        logged_model_id=version.tags[_MODEL_ID],
        run_id=str(version.run_id),
        created_ms=version.creation_timestamp,
        champion=champion,
    )
