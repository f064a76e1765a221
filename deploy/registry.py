"""The model registry: every registered prediction in `<name>-candidates`, the promoted ones in `<name>`.

One registered version is one digest: it holds the verified files as hard links, and registering it again, from another
process or after a crash at any point, ends in the same single version.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from deploy import artifact, wishes
from deploy.candidate import Candidate, digest_of, verify
from deploy.errors import CandidateError
from deploy.reaper import reap
from deploy.runs import Dataset, log_artifacts, log_metrics, open_run
from deploy.tracking import connect, local_path, locked_experiment, page_url, refusals
from deploy.versions import (
    CANDIDATES,
    CHAMPION,
    DIGEST,
    FILES,
    MODEL_ID,
    STEP,
    VERSIONS_TAG,
    RegisteredModelVersion,
    ensure_registered_model,
    known_version,
    registered_names,
    row,
    unknown,
    versions,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel
    from mlflow.entities.model_registry import ModelVersion

__all__ = [
    "CHAMPION",
    "Registered",
    "RegisteredModelVersion",
    "champion",
    "gate_reports",
    "models",
    "names",
    "register",
    "tag",
    "unknown_name",
    "verified",
]

# On a LoggedModel: the names of its gate results, a JSON list, oldest first.
_GATE = "relex.gate"


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


def register(
    model: Path,
    *,
    name: str,
    tracking_uri: str,
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    artifacts: Sequence[Path] = (),
    gate_reports: Sequence[Path] = (),
    description: str = "",
    datasets: Mapping[str, Dataset] | None = None,
    shelf: str = CANDIDATES,
) -> Registered:
    """Verify the model directory and return its one version in `<name>-candidates`, or on another `shelf` of `name`.

    `run_id` is the decision it comes from (`runs.record`); without one the digest gets a run of its own. Metrics are
    logged on the run and the model, with the `datasets` they were measured on (`runs.log_metrics`), tags and the
    `description`, Markdown, on the version, artifacts beside the run; what the first registration logged stands.
    `gate_reports`, JSON files, are what a promotion judges by: kept beside the weights, later ones beside earlier ones.
    Damaged registered files are put right. `weights` are the registry's own files, or `model` itself where artifacts
    are remote. Refuses with CandidateError, DigestConflictError or RegistryError.
    """
    candidate = verify(model)
    client = connect(tracking_uri)
    registered = f"{name}{shelf}"
    with locked_experiment(client, name) as experiment:
        reap(client, name, experiment, but=candidate.digest)
        version = known_version(client, registered, candidate.digest)
        created = version is None
        if version is None:
            logged = _logged_model(client, experiment, candidate, run_id=run_id)
            weights = _store(client, candidate, logged, gate_reports)
            _log(client, logged, metrics=metrics or {}, datasets=datasets, artifacts=artifacts)
            version = _create_version(client, registered, candidate, logged, tags=tags or {}, description=description)
        else:
            logged = client.get_logged_model(version.tags[MODEL_ID])
            weights = _store(client, candidate, logged, gate_reports)
        _link_back(client, logged, version)
    return Registered(
        name=registered,
        version=int(version.version),
        model_uri=f"models:/{registered}/{version.version}",
        logged_model_id=logged.model_id,
        run_id=str(logged.source_run_id),
        digest=candidate.digest,
        weights=weights,
        url=page_url(tracking_uri, f"models/{registered}/versions/{version.version}"),
        created=created,
    )


def names(*, tracking_uri: str) -> list[str]:
    """Return the names under which anything is registered, in alphabetical order."""
    client = connect(tracking_uri)
    with refusals(client):
        return registered_names(client)


def unknown_name(name: str, *, tracking_uri: str) -> str:
    """Return in one line that nothing is registered under a name, and what is; "" for one under which something is."""
    client = connect(tracking_uri)
    with refusals(client):
        return unknown(client, name)


def models(name: str, *, tracking_uri: str) -> list[RegisteredModelVersion]:
    """Return every registered prediction of `name`, newest first; empty where there is none."""
    client = connect(tracking_uri)
    with refusals(client):
        promoted = wishes.standing(client, name, wishes.trail_of(client, name))
        digest = None if promoted is None else promoted.tags.get(DIGEST)
        candidates = versions(client, f"name = '{name}{CANDIDATES}'")
        rows = [row(client, version, champion=version.tags[DIGEST] == digest) for version in candidates]
    return sorted(rows, key=lambda listed: listed.version, reverse=True)


def tag(name: str, version: int, tags: Mapping[str, str], *, tracking_uri: str) -> None:
    """Set tags on version `version` of `<name>-candidates` and on what was promoted of it, where it is there."""
    client = connect(tracking_uri)
    with refusals(client):
        for candidate in versions(client, f"name = '{name}{CANDIDATES}' and version_number = {version}"):
            promoted = versions(client, f"name = '{name}' and tags.`{DIGEST}` = '{candidate.tags[DIGEST]}'")
            for each in (candidate, *promoted):
                for key, value in tags.items():
                    client.set_model_version_tag(each.name, str(each.version), key, value)


def champion(name: str, *, tracking_uri: str) -> RegisteredModelVersion | None:
    """Return the version of `<name>` that stands as champion, or None where nothing was promoted.

    An alias that was moved on MLflow's own page moves it once `champions.settle` has judged that.
    """
    client = connect(tracking_uri)
    with refusals(client):
        version = wishes.standing(client, name, wishes.trail_of(client, name))
        return None if version is None else row(client, version, champion=True)


def verified(
    version: RegisteredModelVersion,
    *,
    tracking_uri: str,
    downloads: Path,
    contents: Literal["read", "sizes"] = "read",
) -> Path:
    """Return the plain from_pretrained directory of a version once it is found to be what was registered.

    Every byte is read; with "sizes" only names, sizes and small files. Remote weights are brought to
    `downloads`/DIGEST, complete or not at all. Refuses with CandidateError what is missing, damaged or replaced.
    """
    directory = local_path(version.weights)
    if directory is None:
        directory = downloads / version.digest
        _download(version.weights, directory, tracking_uri=tracking_uri)
    again = f"To put it right, register the prediction again, or promote another than {version.title}."
    try:
        present = verify(directory, contents=contents)
    except CandidateError as error:
        raise CandidateError(f"{version.title} is not what was registered: {error} {again}") from error
    if (present.digest, digest_of(present.files)) != (version.digest, version.files):
        raise CandidateError(
            f"{version.title} is not what was registered: {directory} holds prediction {present.digest[:12]} with files"
            f" {digest_of(present.files)[:12]}, registered are {version.digest[:12]} and"
            f" {version.files[:12] or 'none'}. {again}"
        )
    return directory


def gate_reports(version: RegisteredModelVersion, *, tracking_uri: str) -> list[str]:
    """Return the texts of the gate results registered with a version, oldest first; empty where there are none.

    CandidateError where one is missing or changed since.
    """
    client = connect(tracking_uri)
    with refusals(client):
        listed = json.loads(client.get_logged_model(version.logged_model_id).tags.get(_GATE, "[]"))
    if not listed:
        return []
    location = f"{version.weights.removesuffix(artifact.MODEL)}{artifact.GATE}"
    with tempfile.TemporaryDirectory() as scratch:
        directory = local_path(location)
        if directory is None:
            directory = Path(scratch) / artifact.GATE
            _download(location, directory, tracking_uri=tracking_uri)
        texts = []
        for name in listed:
            path = directory / f"{name}.json"
            try:
                content = path.read_bytes()
            except OSError as error:
                raise CandidateError(
                    f"gate results {path} of {version.title} cannot be read: {error.strerror}. Register it again."
                ) from error
            if (sha256 := hashlib.sha256(content).hexdigest()) != name:
                raise CandidateError(
                    f"gate results {path} of {version.title} changed: SHA-256 {sha256}. Register it again."
                )
            texts.append(content.decode())
    return texts


def _download(location: str, directory: Path, *, tracking_uri: str) -> None:
    if directory.exists():
        return
    from mlflow.artifacts import download_artifacts

    directory.parent.mkdir(parents=True, exist_ok=True)
    with (
        refusals(connect(tracking_uri)),
        tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch,
    ):
        brought = Path(download_artifacts(location, dst_path=scratch, tracking_uri=tracking_uri))
        try:
            shutil.move(brought, directory)
        except FileExistsError:
            return  # Another process was faster.


def _logged_model(
    client: "MlflowClient", experiment: "Experiment", candidate: Candidate, *, run_id: str | None
) -> "LoggedModel":
    known = client.search_logged_models(
        [experiment.experiment_id], filter_string=f"tags.`{DIGEST}` = '{candidate.digest}'", max_results=1
    )
    if known:
        return known[0]
    title = f"step-{candidate.target_step}"
    if run_id is None:
        run_id = open_run(client, experiment, key=f"digest {candidate.digest}", title=title, tags={}).info.run_id
    # Created together with its digest, so that a crash right after leaves a model the next call finds.
    return client.create_logged_model(
        experiment.experiment_id,
        name=title,
        source_run_id=run_id,
        tags={DIGEST: candidate.digest},
        params={"target_step": str(candidate.target_step), **_method(candidate)},
        model_type="checkpoint" if _method(candidate).get("method.name") == "observed" else "prediction",
    )


def _store(client: "MlflowClient", candidate: Candidate, logged: "LoggedModel", gate_reports: Sequence[Path]) -> Path:
    directory = local_path(logged.artifact_location)
    if directory is not None:
        artifact.build(candidate, directory, model_id=logged.model_id, created_ms=logged.creation_timestamp)
    elif logged.status != "READY":
        artifact.upload(candidate, client, model_id=logged.model_id, created_ms=logged.creation_timestamp)
    known = json.loads(logged.tags.get(_GATE, "[]"))
    added = artifact.add_reports(directory, gate_reports, client, logged.model_id)
    if new := [report for report in added if report not in known]:
        client.set_logged_model_tags(logged.model_id, {_GATE: json.dumps([*known, *new])})
    if logged.status != "READY":
        client.finalize_logged_model(logged.model_id, "READY")
    return candidate.path if directory is None else directory / artifact.MODEL


def _log(
    client: "MlflowClient",
    logged: "LoggedModel",
    *,
    metrics: Mapping[str, float],
    datasets: Mapping[str, Dataset] | None,
    artifacts: Sequence[Path],
) -> None:
    run = client.get_run(str(logged.source_run_id))
    log_metrics(client, run, metrics, model_id=logged.model_id, datasets=datasets)
    log_artifacts(client, run, artifacts)
    if run.info.status != "FINISHED":
        client.set_terminated(run.info.run_id, "FINISHED")


def _method(candidate: Candidate) -> dict[str, str]:
    method = candidate.manifest.get("method")
    scalars = method.items() if isinstance(method, dict) else [("name", method)]
    return {f"method.{key}": str(value) for key, value in scalars if isinstance(value, str | int | float | bool)}


def _create_version(
    client: "MlflowClient",
    registered: str,
    candidate: Candidate,
    logged: "LoggedModel",
    *,
    tags: Mapping[str, str],
    description: str,
) -> "ModelVersion":
    promoted = registered.removesuffix(CANDIDATES)
    about = f"Every model that was registered; what is promoted of them is in `{promoted}`."
    ensure_registered_model(client, registered, about if promoted != registered else description)
    # The source is the artifact location and not models:/m-…: the database resolves that one through the process-wide
    # tracking URI, which belongs to the caller.
    return client.create_model_version(
        registered,
        source=logged.artifact_location,
        run_id=logged.source_run_id,
        model_id=logged.model_id,
        description=description or None,
        tags={
            **tags,
            DIGEST: candidate.digest,
            STEP: str(candidate.target_step),
            MODEL_ID: logged.model_id,
            FILES: digest_of(candidate.files),
        },
    )


def _link_back(client: "MlflowClient", logged: "LoggedModel", version: "ModelVersion") -> None:
    link = {"name": version.name, "version": int(version.version)}
    links = json.loads(client.get_logged_model(logged.model_id).tags.get(VERSIONS_TAG, "[]"))
    if link not in links:
        client.set_logged_model_tags(logged.model_id, {VERSIONS_TAG: json.dumps([*links, link])})
