"""Benchmark: an lm-eval task in one YAML file, named by the content of everything that defines it."""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import yaml

from evaluation.digest import digest_file, digest_value
from evaluation.errors import BenchmarkError
from evaluation.problems import verify_data
from evaluation.report import Setting

SHIPPED = Path(__file__).parent / "benchmarks"
OWN_DATA = "evaluation.problems.load_problems"
# lm-eval's names for one number, in its order of precedence, and its default.
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
DEFAULT_TOKEN_LIMIT = 256
TYPES = ("generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling")


@dataclass(frozen=True)
class Benchmark:
    """A resolved benchmark: its lm-eval task name, its YAML, the sha256 of its content, its generation settings."""

    name: str
    path: Path
    digest: str
    generation: Mapping[str, Setting]


def resolve_benchmark(benchmark: str | Path) -> Benchmark:
    """Return the benchmark behind a shipped name or the path of an lm-eval task YAML.

    The digest covers the YAML with its includes, the source of functions that are not lm-eval's, and local data files,
    but no path. Refuses with BenchmarkError what is unknown, broken, no single task, or has changed data.
    """
    path = _find(benchmark)
    config = _read(path, seen=())
    name = config.get("task")
    if not isinstance(name, str):
        raise BenchmarkError(f"{path} names no single task (task is {name!r}): pass the YAML of one lm-eval task.")
    kind = config.get("output_type", "generate_until")
    if kind not in TYPES:
        raise BenchmarkError(f"{path} has output_type {kind} and lm-eval knows {', '.join(TYPES)}.")
    content = {**config, "data digests": _data_digests(config, path)}
    return Benchmark(name=name, path=path, digest=digest_value(content), generation=_generation(config, kind))


def write_benchmark(
    directory: Path,
    name: str,
    problems: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    base: Literal["exact_match", "boxed_math"] = "exact_match",
) -> Path:
    """Write `name`.jsonl and `name`.yaml, a benchmark of `problems` answered greedily, and return the path of the YAML.

    Each problem has a `prompt` and an `answer`. `base` says how answers are graded. Writing the same again changes
    nothing. Refuses with BenchmarkError problems that are incomplete or the same as another, and a name that holds
    another benchmark.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise BenchmarkError(f"{name!r} cannot name a benchmark: use letters, digits, dots, dashes and underscores.")
    _refuse_unfit(name, problems)
    data = "".join(json.dumps(dict(problem), ensure_ascii=False, sort_keys=True) + "\n" for problem in problems)
    directory.mkdir(parents=True, exist_ok=True)
    data_path = directory / f"{name}.jsonl"
    _write_once(data_path, data)
    head = {
        "task": name,
        "dataset_kwargs": {"data": data_path.name, "sha256": digest_file(data_path)},
        "generation_kwargs": {
            "max_gen_toks": max_new_tokens,
            "do_sample": False,
            "temperature": 0.0,
            "until": list(stop),
        },
    }
    # The base is copied, not included: an include would be a path of this installation, and the benchmark would break
    # when moved.
    text = yaml.safe_dump(head, sort_keys=False) + (SHIPPED / f"{base}.yaml").read_text(encoding="utf-8")
    path = directory / f"{name}.yaml"
    _write_once(path, text)
    return path


def _find(benchmark: str | Path) -> Path:
    shipped = SHIPPED / f"{benchmark}.yaml"
    if isinstance(benchmark, str) and re.fullmatch(r"[\w.-]+", benchmark) and shipped.is_file():
        return shipped
    path = Path(benchmark).absolute()
    if path.is_file():
        return path
    known = sorted(file.stem for file in SHIPPED.glob("*.yaml") if "task" in _read(file, seen=()))
    raise BenchmarkError(
        f"benchmark {benchmark} is neither a file nor shipped (shipped: {', '.join(known) or 'none'}): "
        "pass the path of an lm-eval task YAML, or write one with evaluation.benchmark.write_benchmark."
    )


def _read(path: Path, *, seen: tuple[Path, ...]) -> dict[str, Any]:
    # As lm-eval reads it, includes merged and local keys winning, but a function becomes its name and source digest:
    # nothing is imported here, and lm-eval itself takes seconds to import.
    if path in seen:
        raise BenchmarkError(f"{path} includes itself: remove one of its include lines.")

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: _function(str(node.value), path))
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader=Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise BenchmarkError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise BenchmarkError(f"{path} holds a {type(config).__name__} and must hold the keys of an lm-eval task.")
    includes = config.pop("include", [])
    merged: dict[str, Any] = {}
    for include in [includes] if isinstance(includes, str) else includes:
        merged.update(_read((path.parent / include).resolve(), seen=(*seen, path)))
    return {**merged, **config}


def _function(name: str, path: Path) -> dict[str, str | None]:
    module = name.rpartition(".")[0]
    beside = path.parent / f"{module.replace('.', '/')}.py"
    if beside.is_file():
        return {"function": name, "source": digest_file(beside)}
    if module.startswith("evaluation."):
        spec = find_spec(module)
        if spec is None or spec.origin is None:
            raise BenchmarkError(f"{path} calls {name} and there is no module {module}: correct the name.")
        return {"function": name, "source": digest_file(Path(spec.origin))}
    return {"function": name, "source": None}


def _data_digests(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    data = config.get("dataset_kwargs") or {}
    loader = config.get("custom_dataset")
    if isinstance(loader, dict) and loader["function"] == OWN_DATA:
        if not {"data", "sha256"} <= {*data}:
            raise BenchmarkError(f"{path} needs dataset_kwargs with data and sha256: see evaluation/benchmarks.")
        verify_data(path.parent / data["data"], data["sha256"])
        return {}
    return {name: digest_file(Path(name)) for name in _texts(data) if Path(name).is_file()}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _generation(config: Mapping[str, Any], kind: str) -> dict[str, Setting]:
    if kind != "generate_until":
        return {}
    given = config.get("generation_kwargs") or {}
    limit = next((given[key] for key in TOKEN_LIMITS if given.get(key) is not None), DEFAULT_TOKEN_LIMIT)
    return {"max_new_tokens": int(limit), "temperature": float(given.get("temperature", 0.0))}


def _refuse_unfit(name: str, problems: Sequence[Mapping[str, str]]) -> None:
    if not problems:
        raise BenchmarkError(f"benchmark {name} has no problems: pass at least one.")
    seen: dict[str, int] = {}
    for number, problem in enumerate(problems, start=1):
        if not all(isinstance(problem.get(key), str) and problem[key].strip() for key in ("prompt", "answer")):
            raise BenchmarkError(
                f"problem {number} of {name} needs a prompt and an answer, both text, and has {problem}."
            )
        first = seen.setdefault(digest_value(dict(problem)), number)
        if first != number:
            raise BenchmarkError(
                f"problems {first} and {number} of {name} are the same: remove one, it would count twice."
            )


def _write_once(path: Path, text: str) -> None:
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise BenchmarkError(f"{path} exists and holds another benchmark: choose another name or delete it.")
        return
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    hidden.write_text(text, encoding="utf-8")
    hidden.replace(path)
