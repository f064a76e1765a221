"""The gates of a training run, as relex.yaml files tell that can be seen beside it: what chooses must not use them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from evaluation.yaml_text import read_bounded_yaml
from flows.config import benchmark_location, location
from flows.errors import ConfigError

# The run's directory and so many above it: a relex.yaml is written beside the run, or where the runs lie.
_ABOVE = 2


def refuse_gates(run: str, benchmarks: Sequence[str]) -> None:
    """Refuse a benchmark that a YAML file here, in `run` or in a directory above it names as the gate of `run`.

    Raises ConfigError. A file that is no relex.yaml is passed over.
    """
    chosen = {_place(benchmark): benchmark for benchmark in benchmarks}
    for path, content in _configs(run):
        gate = _place(benchmark_location(str(content["gate"]), path.parent))
        if gate in chosen and _place(location(str(content["checkpoints"]), path.parent)) == _place(run):
            raise ConfigError(
                f"{chosen[gate]} is the gate of training run {content.get('training_run', run)} in {path}: methods that"
                " are chosen by its problems cannot be judged by them any more. Compare on its selection benchmark,"
                f" {content.get('selection', 'another one')}, or on problems of your own."
            )


def _configs(run: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    places = [Path.cwd()]
    if "://" not in run:
        inside = Path(run).resolve()
        places += [inside, *list(inside.parents)[:_ABOVE]]
    for path in sorted({config for place in places for config in place.glob("*.yaml")}):
        try:
            content = read_bounded_yaml(path)
        except (OSError, yaml.YAMLError):
            continue
        if isinstance(content, dict) and {"gate", "checkpoints"} <= content.keys():
            yield path, content


def _place(text: str) -> str:
    name = text.removesuffix("@chat")
    return name if "://" in name or not (Path(name).exists() or "/" in name) else str(Path(name).resolve())
