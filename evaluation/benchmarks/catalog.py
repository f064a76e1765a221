"""Catalog: the benchmarks that can be named, shipped or fetched, and what is known of each."""

from collections.abc import Mapping
from dataclasses import dataclass

from evaluation.benchmarks.benchmark import generation_settings
from evaluation.benchmarks.data_directory import (
    data_directory,
    fetched_benchmarks,
    own_yaml,
    read_manifest,
    shipped_benchmarks,
)
from evaluation.benchmarks.task_yaml import read_yaml
from evaluation.verdict.report import Setting


@dataclass(frozen=True)
class CatalogEntry:
    """One benchmark; `commit` and `directory` are empty unless it has been fetched, `problems` is None if unknown.

    `left_out` is the number of rows of the data set that have no answer to grade by.
    """

    name: str
    measures: str
    problems: int | None
    settings: Mapping[str, Setting]
    hub: str
    commit: str = ""
    directory: str = ""
    left_out: int = 0


def catalog() -> list[CatalogEntry]:
    """Return the shipped benchmarks, then the others that have been fetched, by name."""
    shipped = shipped_benchmarks()
    return [entry(name) for name in (*shipped, *(name for name in fetched_benchmarks() if name not in shipped))]


def entry(name: str) -> CatalogEntry:
    """Return what is known of a benchmark that is shipped or fetched."""
    manifest = read_manifest(name)
    task = own_yaml(name, "" if manifest is None else manifest.task)
    config = {} if task is None else read_yaml(task)
    metadata = config.get("metadata") or {}
    common = {
        "name": name,
        "measures": metadata.get("measures", f"lm-eval task, {_metric(config)}"),
        "settings": generation_settings(config),
    }
    if manifest is None:
        return CatalogEntry(**common, problems=metadata["problems"], hub=metadata["recipe"]["hub"])
    asked = next((config[key] for key in ("test_split", "validation_split") if config.get(key)), "test")
    return CatalogEntry(
        **common,
        problems=manifest.splits[asked].problems if asked in manifest.splits else None,
        hub=manifest.recipe["hub"],
        commit=manifest.commit,
        directory=str(data_directory() / name),
        left_out=len(manifest.left_out),
    )


def _metric(config: Mapping[str, object]) -> str:
    metrics = config.get("metric_list")
    if isinstance(metrics, list) and metrics and isinstance(metrics[0].get("metric"), str):
        return str(metrics[0]["metric"])
    return "its own metric"
