"""Clears what a killed process left: unfinished models, runs shown as running, half-written files, unused copies.

The caller holds the lock under which all of it is made, so whatever is unfinished has nobody who finishes it.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deploy import audit, wishes
from deploy.runs import KEY_TAG
from deploy.tracking import local_path
from deploy.versions import AUDIT, CANDIDATES, DIGEST, OBSERVED, VERSIONS_TAG, champion_version, known_version, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, LoggedModel, Run


def reap(client: "MlflowClient", name: str, experiment: "Experiment", *, but: str = "") -> None:
    """Clear what lies unfinished in a locked experiment, except what belongs to the digest `but`.

    A promotion that had moved the alias is completed, one that had not is undone. Predictions themselves are never
    touched: the registry's files are links or copies.
    """
    for logged in _models(client, experiment):
        digest = logged.tags.get(DIGEST)
        # A model that ever had a version stays, whoever deleted that.
        if digest is None or digest == but or VERSIONS_TAG in logged.tags:
            continue
        if all(known_version(client, f"{name}{shelf}", digest) is None for shelf in (CANDIDATES, OBSERVED)):
            whole = directory_of(logged)
            if whole is not None and whole.exists():
                shutil.rmtree(whole)
            client.delete_logged_model(logged.model_id)
    for run in _running(client, experiment):
        if AUDIT in run.data.tags:
            _settle(client, name, run)
        else:
            client.set_terminated(run.info.run_id, "KILLED")
    if (root := local_path(experiment.artifact_location)) is not None:
        for unfinished in Path(root).rglob(".*.partial"):
            unfinished.unlink(missing_ok=True)


def directory_of(logged: "LoggedModel") -> Path | None:
    """Return the directory that a model alone has, None where artifacts are remote."""
    directory = local_path(logged.artifact_location)
    # MLflow gives each model a directory of its name with artifacts/ in it.
    return directory.parent if directory is not None and directory.parent.name == logged.model_id else directory


def _settle(client: "MlflowClient", name: str, run: "Run") -> None:
    """Complete the audit run of a promotion or rollback if the alias was moved, otherwise undo what it had begun."""
    entry = audit.entry_of(client, run)
    champion = champion_version(client, name)
    if entry.verdict == "under way" and champion is not None and entry.to_version == int(champion.version):
        entry = audit.decide(client, entry, audit.DONE[entry.action])
    if entry.verdict != "under way":
        if entry.asked:
            wishes.answer(client, name, entry)
        audit.close(client, entry, entry.verdict)
    else:
        for copy in versions(client, f"name = '{name}' and tags.`{AUDIT}` = '{entry.number}'"):
            client.delete_model_version(name, str(copy.version))
        audit.close(client, entry, "abandoned")


def _models(client: "MlflowClient", experiment: "Experiment") -> Iterator["LoggedModel"]:
    token = None
    while True:
        page = client.search_logged_models([experiment.experiment_id], page_token=token)
        yield from page
        token = page.token
        if not token:
            return


def _running(client: "MlflowClient", experiment: "Experiment") -> list["Run"]:
    running = client.search_runs([experiment.experiment_id], filter_string="attributes.status = 'RUNNING'")
    return [run for run in running if KEY_TAG in run.data.tags]
