"""Names of flow and task runs, so that a list of them in the Prefect UI says what each one is about."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from prefect.runtime import flow_run, task_run

from evaluation.yaml_text import read_bounded_yaml


def flow_run_name(describe: Callable[[str, dict[str, Any]], str]) -> Callable[[], str]:
    """Return what names a flow run: what `describe` says of the training run of its `config`, and its parameters."""
    return lambda: describe(_training_run(flow_run.parameters), flow_run.parameters)


def task_run_name(describe: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    """Return what names a task run: what `describe` says of its parameters."""
    return lambda: describe(task_run.parameters)


def benchmark_name(benchmark: str) -> str:
    """Return what a benchmark is called, which is given by its name or as a YAML file."""
    return Path(benchmark).stem if benchmark.endswith((".yaml", ".yml")) else benchmark


def _training_run(parameters: dict[str, Any]) -> str:
    config = Path(str(parameters.get("config", "")))
    try:
        content = read_bounded_yaml(config)
    except (OSError, yaml.YAMLError):
        content = None
    # What cannot be read is refused by the flow itself, under a name that tells which file it is.
    named = content.get("training_run") if isinstance(content, dict) else None
    return str(named or config.stem)
