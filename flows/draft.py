"""A relex.yaml for a training run, drafted from what the run's files say and what lies around."""

import math
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import yaml

from evaluation.benchmarks.catalog import catalog
from evaluation.benchmarks.task_yaml import read_yaml
from evaluation.errors import EvaluationError
from flows.errors import ConfigError
from relex.backtest.backtest import FEWEST
from relex.files.location import is_remote, open_directory
from relex.layouts.planned import Planned, planned
from relex.layouts.pruning import find_limit

# The share of its planned steps at which a run is decided on at the latest.
_WINDOW_SHARE = 0.2
_MOST_NAME = 60
# Shipped, made for one another, and to be fetched.
_SHIPPED = ("math_select", "math_gate")
# What people call a benchmark that chooses, and one that decides.
_CHOOSE = ("sel", "val", "dev")
_DECIDE = ("gate", "test")


def draft(run: str, config: Path, *, base: str | None, selection: str | None, gate: str | None) -> str:
    """Return the text of a relex.yaml that is to be written as `config`.

    Raises ConfigError where that is there, where there is no such run, and where nothing says what it started from.
    """
    if config.exists():
        raise ConfigError(f"{config} is there and is not written over. Give another name with --out, or delete it.")
    directory = open_directory(run)
    if not directory.exists():
        raise ConfigError(f"{run} is not there. Give the directory that the trainer writes its checkpoints to.")
    plan = planned(directory)
    base = base or _model(plan.base)
    if base is None:
        raise ConfigError(f"nothing in {run} says which model it started from. Give it with --base.")
    root = config.absolute().parent
    name = _name(directory.name)
    chosen = _benchmarks(root, name, selection, gate)
    rows = [
        ("training_run", name, "lower-case letters, digits, dashes"),
        ("checkpoints", _place(run, root), "where the trainer writes its checkpoints"),
        ("base", _place(base, root), "what it started from"),
        *_window(plan),
        ("methods", "auto", "relex, secant and the one that the backtest trusts"),
        ("selection", chosen[0], "chooses among the candidates"),
        ("gate", chosen[1], "decides on the chosen one; shares no problem with selection"),
        ("registered_model", name, f"predictions go to {name}-candidates"),
    ]
    limit = find_limit(directory)
    if limit is not None and not is_remote(run):
        rows.append(("pin", "link", f"{limit.setting} is {limit.kept}: the trainer deletes the window's checkpoints"))
    if shutil.which("nvidia-smi"):
        rows.append(("device", "cuda", "or several: cuda:0,cuda:1"))
    return "".join(f"{_line(key, value):<44} # {meaning}\n" for key, value, meaning in rows)


def _window(plan: Planned) -> list[tuple[str, object, str]]:
    latest = plan.steps[-1] if plan.steps else None
    spacing = plan.spacing or 1
    if plan.max_steps is not None:
        share = math.ceil(_WINDOW_SHARE * plan.max_steps / spacing) * spacing
        # Before that many checkpoints there is no backtest.
        last = min(max(share, FEWEST * spacing), plan.max_steps - 1)
        told = f"{100 * _WINDOW_SHARE:.0f} % of the {plan.max_steps} steps that the trainer's files name"
        return [
            ("window", "auto", "decide as soon as the backtest has converged"),
            ("max_window", last, f"and at this step at the latest: {told}"),
            ("targets", "auto", "a ladder up to total_steps, climbed while scores last"),
            ("total_steps", plan.max_steps, "what the run is planned for"),
        ]
    last = latest or 100
    told = "the latest that is there" if latest else "nothing says how long the run is: give 20 % of its steps"
    return [
        ("window", "auto", "decide as soon as the backtest has converged"),
        ("max_window", last, f"and at this step at the latest: {told}"),
        ("targets", "auto", "a ladder, climbed while scores last"),
    ]


def _line(key: str, value: object) -> str:
    return yaml.safe_dump({key: value}, width=math.inf).strip()


def _name(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower())[:_MOST_NAME].strip("-") or "run"


def _model(told: str) -> str | None:
    """Return the directory or the URL of what a trainer calls its model."""
    if not told or is_remote(told):
        return told or None
    if Path(told).exists() or told.startswith(("/", ".", "~")) or told.count("/") != 1:
        return told
    return f"hf://{told}"


def _place(text: str, root: Path) -> str:
    """Return a path as it is written in a config in `root`: relative where it lies below."""
    if is_remote(text):
        return text
    path = Path(text).expanduser().absolute()
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _benchmarks(root: Path, run: str, selection: str | None, gate: str | None) -> tuple[str, str]:
    """Return what chooses and what decides: as given, else by name from the tasks here or those that were fetched.

    Of several pairs the one whose name stands in the run's; of two that no name tells apart the larger decides.
    """
    given = [_place(each, root) if each is not None and Path(each).is_file() else each for each in (selection, gate)]
    here = _tasks(root)
    names = [name for name in (here if len(here) > 1 else (*here, *_fetched())) if name not in given]
    choosing, deciding = [given[0]] if given[0] else _called(names, _CHOOSE), _called(names, _DECIDE)
    pairs = [(one, other) for one in choosing for other in deciding if one != other and _topic(one) == _topic(other)]
    pairs.sort(key=lambda pair: -len(_topic(pair[0])) if _topic(pair[0]) in run else 0)
    if pairs and given[1] is None:
        return pairs[0]
    first = (choosing or names or _SHIPPED)[0]
    left = [name for name in deciding or names if name != first]
    return first, given[1] or (left or _SHIPPED)[-1]


def _called(names: Sequence[str], words: Sequence[str]) -> list[str]:
    return [name for name in names if any(word in Path(name).stem.lower() for word in words)]


def _topic(name: str) -> str:
    """Return what a benchmark's name says besides what it is for: `sort` of sort-select."""
    words = re.split(r"[^a-z0-9]+", Path(name).stem.lower())
    return "-".join(word for word in words if not any(part in word for part in (*_CHOOSE, *_DECIDE)))


def _tasks(root: Path) -> list[str]:
    """Return the task files in a directory and in its `benchmarks`, relative to it."""
    tasks = []
    for path in sorted((*root.glob("*.yaml"), *(root / "benchmarks").glob("*.yaml"))):
        # Other files of that kind lie there, too.
        with suppress(EvaluationError):
            if isinstance(read_yaml(path).get("task"), str):
                tasks.append(str(path.relative_to(root)))
    return tasks


def _fetched() -> list[str]:
    """Return the names of the benchmarks that were fetched, from the smallest."""
    fetched = [entry for entry in catalog() if entry.commit]
    return [entry.name for entry in sorted(fetched, key=lambda entry: entry.problems or 0)]
