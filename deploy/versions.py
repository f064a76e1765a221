"""Versions of a registered model, as rows: what was predicted, from which run, and where the weights lie."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING

from deploy import artifact

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
CANDIDATES = "-candidates"
OBSERVED = "-observed"
# Tags of a version: its digest, step and LoggedModel, a digest of its files, and the audit entry that copied it.
DIGEST = "relex.digest"
STEP = "relex.target_step"
MODEL_ID = "relex.logged_model_id"
FILES = "relex.files"
AUDIT = "relex.audit"
# For people: by which real step, and how many points.
OVERTAKEN = "overtaken"
# MLflow's pages find the versions of a LoggedModel through this tag; a server sets it, the bare database does not.
VERSIONS_TAG = "mlflow.modelVersions"


@dataclass(frozen=True)
class RegisteredModelVersion:
    """A row of the registry: what was predicted, the caller's tags, and where the weights lie (a path or a URI).

    `files` is the digest of the list of files that was registered, empty for a version that has none.
    """

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
    files: str

    @property
    def title(self) -> str:
        """What a sentence calls it."""
        return f"{self.name} version {self.version}"


def known_version(client: "MlflowClient", registered: str, digest: str) -> "ModelVersion | None":
    """Return the version of `registered` with this digest, or None."""
    return next(versions(client, f"name = '{registered}' and tags.`{DIGEST}` = '{digest}'"), None)


def versions(client: "MlflowClient", filter_string: str) -> Iterator["ModelVersion"]:
    """Yield every version the filter finds, page by page."""
    token = None
    while True:
        page = client.search_model_versions(filter_string, page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def registered_names(client: "MlflowClient") -> list[str]:
    """Return the names under which anything is registered, in alphabetical order."""
    registered, token = [], None
    while True:
        listed = client.search_registered_models(f"name LIKE '%{CANDIDATES}'", page_token=token)
        registered += [model.name.removesuffix(CANDIDATES) for model in listed]
        token = listed.token
        if not token:
            return sorted(registered)


def unknown(client: "MlflowClient", name: str) -> str:
    """Return in one line that nothing is registered under a name, and under which there is; "" for a known one."""
    there = registered_names(client)
    if name in there:
        return ""
    meant = name.removesuffix(CANDIDATES)
    if meant in there:
        return f"{name} holds the candidates of {meant}: name {meant}."
    if not there:
        return f"nothing is registered under that name ({name}), nor under any other."
    near = get_close_matches(name, there, n=1)
    asked = f" Did you mean {near[0]}?" if near else ""
    return f"nothing is registered under that name ({name}). Registered are {', '.join(there)}.{asked}"


def champion_version(client: "MlflowClient", name: str) -> "ModelVersion | None":
    """Return the version of `name` that carries the alias champion, or None."""
    return alias_version(client, name, CHAMPION)


def alias_version(client: "MlflowClient", name: str, alias: str) -> "ModelVersion | None":
    """Return the version of `name` that carries an alias, or None."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, alias)
    except MlflowException as error:
        # The registered model, or the alias on it, does not exist yet.
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise


def ensure_registered_model(client: "MlflowClient", name: str, description: str) -> None:
    """Create the registered model where it is missing; one that is there keeps its description."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description=description)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def row(client: "MlflowClient", version: "ModelVersion", *, champion: bool) -> RegisteredModelVersion:
    """Return what is known of a version."""
    location = client.get_model_version_download_uri(version.name, version.version)
    run = client.get_run(str(version.run_id))
    return RegisteredModelVersion(
        name=version.name,
        version=int(version.version),
        digest=version.tags[DIGEST],
        target_step=int(version.tags[STEP]),
        tags={key: value for key, value in version.tags.items() if not key.startswith("relex.")},
        metrics=dict(run.data.metrics),
        weights=f"{location}/{artifact.MODEL}",
        logged_model_id=version.tags[MODEL_ID],
        run_id=str(version.run_id),
        created_ms=version.creation_timestamp,
        champion=champion,
        files=version.tags.get(FILES, ""),
    )
