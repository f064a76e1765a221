"""Data directory: the benchmarks that were brought from the Hub, each with a manifest of what it is.

    <data>/math/manifest.json   data set, commit, how it was read, and the sha256 of every file: written last
    <data>/math/test.jsonl      the problems, a file a split
    <data>/math/math.yaml       the task with these files in the place of the Hub
    <data>/math/math@chat.yaml  the same, asked in the chat template that the model brings

The directory is RELEX_BENCHMARKS, otherwise the user's data directory.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import platformdirs
import yaml

from evaluation.benchmarks.task_yaml import SHIPPED, find_task, read_yaml
from evaluation.errors import BenchmarkError
from evaluation.files import write_file
from evaluation.problems import verify_data

VARIABLE = "RELEX_BENCHMARKS"
# Behind a name: ask in the model's own chat template.
CHAT = "@chat"


@dataclass(frozen=True)
class Split:
    """The problems of one split: a file beside the manifest, its sha256 (hex), and how many there are."""

    file: str
    sha256: str
    problems: int


@dataclass(frozen=True)
class DataManifest:
    """What a benchmark's data is: from which commit of which data set, read how, and the files that came of it.

    `task` is the YAML of the task itself; `left_out` names each row of the data set that has no answer to grade by.
    """

    task: str
    recipe: Mapping[str, Any]
    commit: str
    splits: Mapping[str, Split]
    left_out: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the manifest as JSON that `from_json` reads back to an equal one."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return the manifest that `to_json` wrote; TypeError, KeyError or ValueError when it is none."""
        fields = json.loads(text)
        splits = {name: Split(**split) for name, split in fields.pop("splits").items()}
        return cls(splits=splits, left_out=tuple(fields.pop("left_out")), **fields)


def data_directory() -> Path:
    """Return the directory of fetched benchmarks, which need not exist."""
    given = os.environ.get(VARIABLE)
    return Path(given).absolute() if given else platformdirs.user_data_path("relex") / "benchmarks"


def shipped_benchmarks() -> list[str]:
    """Return the names of the benchmarks that come with this package, whether or not their data has been fetched."""
    return sorted(file.stem for file in SHIPPED.glob("*.yaml") if "task" in read_yaml(file))


def fetched_benchmarks() -> list[str]:
    """Return the names of all benchmarks whose data has been fetched."""
    return sorted(path.parent.name for path in data_directory().glob("*/manifest.json"))


def read_manifest(name: str) -> DataManifest | None:
    """Return the manifest of a fetched benchmark, None when it has not been fetched; BenchmarkError when damaged."""
    path = data_directory() / name / "manifest.json"
    try:
        return DataManifest.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise BenchmarkError(f"{path} is damaged: delete it and run relex benchmarks fetch {name}") from error


def verify(name: str, manifest: DataManifest) -> None:
    """Refuse with BenchmarkError files that are missing or other than the manifest says."""
    for split in manifest.splits.values():
        verify_data(data_directory() / name / split.file, split.sha256)


def fetched_yaml(benchmark: str) -> Path | None:
    """Return the YAML of a fetched benchmark, None when it has not been fetched; `@chat` may follow its name.

    It includes the task's own YAML by its place in this installation, so it is written again where that has moved.
    """
    name = benchmark.removesuffix(CHAT)
    manifest = read_manifest(name)
    if manifest is None:
        return None
    task = own_yaml(name, manifest.task)
    if task is None:
        raise BenchmarkError(
            f"{name} was fetched for {manifest.task}, which is gone: run relex benchmarks fetch {name}"
        )
    config = read_yaml(task)
    asked = next((config[key] for key in ("test_split", "validation_split") if config.get(key)), "test")
    content: dict[str, Any] = {
        "include": str(task),
        "dataset_kwargs": {
            "data": {split: entry.file for split, entry in manifest.splits.items()},
            "sha256": {split: entry.sha256 for split, entry in manifest.splits.items()},
            "asked": asked,
        },
    }
    functions = "custom_dataset: !function evaluation.problems.load_problems\n"
    if benchmark != name:
        content |= {"task": benchmark, "metadata": {**(config.get("metadata") or {}), "chat_template": True}}
        asks = config.get("doc_to_text")
        if isinstance(asks, dict) and asks["function"] == "evaluation.prompts.raw_chat":
            functions += "doc_to_text: !function evaluation.prompts.instructed\n"
    text = (
        "# Written by relex benchmarks fetch; manifest.json says what the data is.\n"
        + yaml.safe_dump(content, sort_keys=False)
        + functions
    )
    path = data_directory() / name / f"{benchmark}.yaml"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_file(path, text)
    return path


def own_yaml(name: str, known: str) -> Path | None:
    """Return the YAML of the task itself: shipped, or where it was when fetched, or wherever lm-eval has it now."""
    shipped = SHIPPED / f"{name}.yaml"
    if shipped.is_file():
        return shipped
    return Path(known) if Path(known).is_file() else find_task(name)
