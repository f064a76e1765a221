"""Task YAML: what defines an lm-eval task, read without importing what it names, and found by the task's name."""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from evaluation.digest import digest_file, digest_value
from evaluation.errors import BenchmarkError
from evaluation.yaml_text import read_bounded_yaml

SHIPPED = Path(__file__).parent
_MOST_INCLUDES = 100
# What else decides a grade.
ALSO = {
    "evaluation.grading": tuple(
        f"evaluation.grading.{name}"
        for name in ("score", "notation", "equality", "comparison", "structure", "brackets", "regions", "formula")
    )
}


def find_task(name: str, *, include: Sequence[Path] = ()) -> Path | None:
    """Return the YAML of the lm-eval task `name` in the directories of `include` or in lm-eval itself, None if nowhere.

    Found by its text, in a fraction of a second: lm-eval's own index of all tasks takes a quarter of a minute.
    """
    harness = find_spec("lm_eval")
    places = (harness and harness.submodule_search_locations) or ()
    line = re.compile(rb"^task:[ \t]*[\"']?" + re.escape(name.encode()) + rb"[\"']?[ \t]*(?:#.*)?\r?$", re.MULTILINE)
    for directory in (*include, *(Path(place) / "tasks" for place in places)):
        # A file of the same name first, else the first in order: a name is given once.
        files = sorted(directory.rglob("*.yaml"), key=lambda path: (path.stem != name, path))
        for path in files:
            if line.search(path.read_bytes()):
                return path.absolute()
    return None


def read_yaml(path: Path) -> dict[str, Any]:
    """Return an lm-eval task YAML as lm-eval reads it, includes merged and local keys winning.

    But a function becomes its name and the digest of its source: nothing is imported, and lm-eval takes seconds to.
    """
    return _merged(path, (), [])


def _merged(path: Path, above: tuple[Path, ...], read: list[Path]) -> dict[str, Any]:
    """Return a YAML with its includes merged; `above` are the files that include it, `read` all that were read."""
    if path in above:
        raise BenchmarkError(f"{path} includes itself: remove one of its include lines.")
    read.append(path)
    if len(read) > _MOST_INCLUDES:
        raise BenchmarkError(
            f"{read[0]} includes more than {_MOST_INCLUDES} files, {path} again and again: merge them."
        )

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: _function(str(node.value), path))
    try:
        config = read_bounded_yaml(path, loader=Loader)
    except (OSError, yaml.YAMLError) as error:
        raise BenchmarkError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BenchmarkError(f"{path} holds a {type(config).__name__} and must hold the keys of an lm-eval task.")
    includes = config.pop("include", [])
    named = [includes] if isinstance(includes, str) else includes
    if not isinstance(named, list) or not all(isinstance(include, str) for include in named):
        raise BenchmarkError(f"{path}: include must be the path of a YAML, or a list of paths.")
    merged: dict[str, Any] = {}
    for include in named:
        merged.update(_merged((path.parent / include).resolve(), (*above, path), read))
    return {**merged, **config}


def _function(name: str, path: Path) -> dict[str, str | None]:
    module = name.rpartition(".")[0]
    beside = path.parent / f"{module.replace('.', '/')}.py"
    if beside.is_file():
        return {"function": name, "source": digest_file(beside)}
    if module.startswith("evaluation."):
        sources = [_source(each, name, path) for each in (module, *ALSO.get(module, ()))]
        return {"function": name, "source": sources[0] if len(sources) == 1 else digest_value(sources)}
    return {"function": name, "source": None}


def _source(module: str, name: str, path: Path) -> str:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise BenchmarkError(f"{path} calls {name} and there is no module {module}: correct the name.")
    return digest_file(Path(spec.origin))
