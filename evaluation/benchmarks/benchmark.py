"""Benchmark: an lm-eval task in one YAML file, named by the content of everything that defines it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from evaluation.benchmarks.data_directory import CHAT, fetched_yaml, shipped_benchmarks
from evaluation.benchmarks.task_yaml import SHIPPED, find_task, read_yaml
from evaluation.digest import digest_file, digest_value
from evaluation.errors import BenchmarkError
from evaluation.files import write_file
from evaluation.problems import HASH, files, lines, verify_data
from evaluation.verdict.report import Setting

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
    """Return the benchmark behind the name of a fetched one or the path of an lm-eval task YAML.

    `@chat` behind a name asks in the model's own chat template instead of the format that the benchmark is written in.
    The digest covers the YAML with its includes, the source of functions that are not lm-eval's, and local data files,
    but no path. Refuses with BenchmarkError what is unknown, broken, no single task, or has changed data.
    """
    path = _find(benchmark)
    config = read_yaml(path)
    name = config.get("task")
    if not isinstance(name, str):
        raise BenchmarkError(f"{path} names no single task (task is {name!r}): pass the YAML of one lm-eval task.")
    kind = config.get("output_type", "generate_until")
    if kind not in TYPES:
        raise BenchmarkError(f"{path} has output_type {kind} and lm-eval knows {', '.join(TYPES)}.")
    content = {**config, "data digests": _data_digests(config, path)}
    return Benchmark(name=name, path=path, digest=digest_value(content), generation=generation_settings(config))


def generation_settings(config: Mapping[str, Any]) -> dict[str, Setting]:
    """Return how answers to a task YAML, as `read_yaml` returns it, are generated; nothing when it generates none."""
    if config.get("output_type", "generate_until") != "generate_until":
        return {}
    given = config.get("generation_kwargs") or {}
    limit = next((given[key] for key in TOKEN_LIMITS if given.get(key) is not None), DEFAULT_TOKEN_LIMIT)
    return {
        "max_new_tokens": int(limit),
        "temperature": float(given.get("temperature", 0.0)),
        "top_p": float(given.get("top_p", 1.0)),
        "samples": int(config.get("repeats", 1)),
    }


def write_benchmark(
    directory: Path,
    name: str,
    problems: Sequence[Mapping[str, str]],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    base: Literal["exact_match", "boxed_math"] = "exact_match",
    order: Literal["hash", "given"] = "hash",
) -> Path:
    """Write `name`.jsonl and `name`.yaml, a benchmark of `problems` answered greedily, and return the path of the YAML.

    Each problem has a `prompt` and an `answer`. `base` says how answers are graded. They are asked in the order of
    their ids, so that the first n are a sample, or as they are `given`. Writing the same again changes nothing. Refuses
    with BenchmarkError problems that are incomplete or the same as another, and a name that holds another benchmark.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise BenchmarkError(f"{name!r} cannot name a benchmark: use letters, digits, dots, dashes and underscores.")
    _refuse_unfit(name, problems)
    data = lines(problems)
    directory.mkdir(parents=True, exist_ok=True)
    data_path = directory / f"{name}.jsonl"
    _write_once(data_path, data)
    head = {
        "task": name,
        "dataset_kwargs": {
            "data": data_path.name,
            "sha256": digest_file(data_path),
            **({} if order == HASH else {"order": order}),
        },
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
    name = str(benchmark).removesuffix(CHAT)
    named = isinstance(benchmark, str) and re.fullmatch(r"[\w.-]+", name) is not None
    if named:
        fetched = fetched_yaml(str(benchmark))
        if fetched is not None:
            return fetched
        if (SHIPPED / f"{name}.yaml").is_file():
            if name not in shipped_benchmarks():
                return SHIPPED / f"{name}.yaml"
            raise BenchmarkError(f"{name} has not been fetched: run relex benchmarks fetch {name}")
    path = Path(benchmark).absolute()
    if path.is_file():
        return path
    if str(benchmark).endswith(CHAT) and Path(name).is_file():
        raise BenchmarkError(f"{name} is a file: ask in the model's chat template by metadata, chat_template: true")
    if named and find_task(name) is not None:
        raise BenchmarkError(f"{name} is a task of lm-eval and has not been fetched: run relex benchmarks fetch {name}")
    raise BenchmarkError(
        f"benchmark {benchmark} is no file, not shipped ({', '.join(shipped_benchmarks())}) and no task of lm-eval: "
        "pass the path of an lm-eval task YAML, or write one with evaluation.benchmarks.benchmark.write_benchmark."
    )


def _data_digests(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    data = config.get("dataset_kwargs") or {}
    loader = config.get("custom_dataset")
    if isinstance(loader, dict) and loader["function"] == OWN_DATA:
        if not {"data", "sha256"} <= {*data}:
            raise BenchmarkError(f"{path} needs dataset_kwargs with data and sha256: see evaluation/benchmarks.")
        for name, sha256 in files(data["data"], data["sha256"]).values():
            verify_data(path.parent / name, sha256)
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
    write_file(path, text)
