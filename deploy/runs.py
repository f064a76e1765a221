"""MLflow runs: one per decision, registered or refused, and one per curve."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.errors import RegistryError
from deploy.tracking import connect, locked_experiment, page_url

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

KEY_TAG = "relex.key"
# MLflow takes at most 1,000 metrics in one call.
_BATCH = 1000
_LONGEST = 6000
# Of a dataset's digest it takes so many characters.
_DIGEST = 36


@dataclass(frozen=True)
class Dataset:
    """What a metric was measured on: the name of a benchmark, and the sha256 of its content."""

    name: str
    digest: str


@dataclass(frozen=True)
class Recorded:
    """One MLflow run: its id, and its page where a server shows it."""

    run_id: str
    url: str | None


def record(
    name: str,
    *,
    tracking_uri: str,
    key: str,
    title: str,
    parameters: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    tags: Mapping[str, str] | None = None,
    artifacts: Sequence[Path] = (),
    parent: str | None = None,
    description: str = "",
    datasets: Mapping[str, Dataset] | None = None,
) -> Recorded:
    """Record one decision in the experiment `name`, complete or not at all; the same `key` again is the same run.

    What the first complete call recorded stands; later calls with its key change nothing. `parent` is the id of the run
    it is shown under, as a candidate under its decision, `description` Markdown on its page, `datasets` what was
    measured on what, see `log_metrics`. RegistryError where MLflow refuses.
    """
    from mlflow.entities import Param
    from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

    client = connect(tracking_uri)
    below = {} if parent is None else {MLFLOW_PARENT_RUN_ID: parent}
    below |= {MLFLOW_RUN_NOTE: description} if description else {}
    with locked_experiment(client, name) as experiment:
        run = open_run(client, experiment, key=key, title=title, tags={**(tags or {}), **below})
        if run.info.status != "FINISHED":
            client.log_batch(run.info.run_id, params=[Param(*pair) for pair in _texts(parameters or {}).items()])
            log_metrics(client, run, metrics or {}, datasets=datasets)
            log_artifacts(client, run, artifacts)
            client.set_terminated(run.info.run_id, "FINISHED")
    return _recorded(tracking_uri, run)


def log_series(
    name: str,
    points: Mapping[int, float],
    *,
    tracking_uri: str,
    series: str,
    metric: str,
    tags: Mapping[str, str] | None = None,
) -> Recorded:
    """Log one curve of the experiment `name` as one run, with the training step as MLflow's step.

    Runs of one experiment with the same `metric` are drawn in one chart. A point logged before is not logged twice,
    new points extend the curve.
    """
    from mlflow.entities import Metric

    client = connect(tracking_uri)
    with locked_experiment(client, name) as experiment:
        run = open_run(client, experiment, key=f"series {series}", title=series, tags=tags or {})
        # With one fixed time a repeated point is the same row.
        rows = [Metric(metric, value, run.info.start_time, step) for step, value in sorted(points.items())]
        for start in range(0, len(rows), _BATCH):
            client.log_batch(run.info.run_id, metrics=rows[start : start + _BATCH])
        client.set_terminated(run.info.run_id, "FINISHED")
    return _recorded(tracking_uri, run)


def annotate(
    name: str, *, tracking_uri: str, key: str, title: str, metrics: Mapping[str, float], tags: Mapping[str, str]
) -> Recorded:
    """Add to the run of `key` what came of its decision later; again with the same values it adds nothing."""
    client = connect(tracking_uri)
    with locked_experiment(client, name) as experiment:
        run = open_run(client, experiment, key=key, title=title, tags={})
        for tag, value in tags.items():
            client.set_tag(run.info.run_id, tag, value)
        log_metrics(client, run, metrics)
    return _recorded(tracking_uri, run)


def open_run(
    client: "MlflowClient", experiment: "Experiment", *, key: str, title: str, tags: Mapping[str, str]
) -> "Run":
    """Return the run of `key` in a locked experiment, created where it is missing."""
    if not re.fullmatch(r"[\w .,:/@=+-]{1,200}", key):
        raise RegistryError(f"{key!r} is no key for a run. Use up to 200 letters, digits, spaces and .,:/@=+-_.")
    known = client.search_runs([experiment.experiment_id], filter_string=f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
    if known:
        return known[0]
    # Created together with its key, so that a crash right after leaves a run the next call finds.
    return client.create_run(experiment.experiment_id, run_name=title, tags={**tags, KEY_TAG: key})


def log_metrics(
    client: "MlflowClient",
    run: "Run",
    metrics: Mapping[str, float],
    *,
    model_id: str | None = None,
    datasets: Mapping[str, Dataset] | None = None,
) -> None:
    """Log single values on a run, and on a model; again with the same values it adds nothing.

    `datasets`, by the beginning of a metric's name, are inputs of the run too: MLflow's pages show what was measured on
    what.
    """
    from mlflow.entities import Dataset as Input
    from mlflow.entities import DatasetInput, Metric

    known = {key: each for key in metrics for beginning, each in (datasets or {}).items() if key.startswith(beginning)}
    rows = [
        Metric(
            key,
            value,
            run.info.start_time,
            0,
            model_id=model_id,
            dataset_name=known[key].name if key in known else None,
            dataset_digest=known[key].digest[:_DIGEST] if key in known else None,
        )
        for key, value in metrics.items()
    ]
    if rows:
        client.log_batch(run.info.run_id, metrics=rows)
    if known:
        inputs = [Input(each.name, each.digest[:_DIGEST], "relex", each.digest) for each in {*known.values()}]
        client.log_inputs(run.info.run_id, [DatasetInput(each) for each in inputs])


def _texts(parameters: Mapping[str, object]) -> dict[str, str]:
    # MLflow refuses a longer one.
    return {name: str(value)[:_LONGEST] for name, value in parameters.items()}


def log_artifacts(client: "MlflowClient", run: "Run", artifacts: Sequence[Path]) -> None:
    """Copy small files beside a run, under their own names."""
    for path in artifacts:
        client.log_artifact(run.info.run_id, str(path))


def _recorded(tracking_uri: str, run: "Run") -> Recorded:
    path = f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    return Recorded(run.info.run_id, page_url(tracking_uri, path))
