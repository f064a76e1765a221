"""Fetch: brings a benchmark's data from the Hub, once, into canonical JSONL that is the same for everybody.

A data set is named by its commit. Where a benchmark names a branch, the branch is resolved when it is first fetched,
and the commit is kept in the manifest: whoever has the manifest gets the same bytes or a refusal.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx
from filelock import FileLock

from evaluation.benchmarks.data_directory import (
    DataManifest,
    Split,
    data_directory,
    fetched_benchmarks,
    own_yaml,
    read_manifest,
    verify,
)
from evaluation.benchmarks.recipe import Rows, prepare, recipe_of
from evaluation.benchmarks.task_yaml import find_task, read_yaml
from evaluation.errors import BenchmarkError
from evaluation.files import write_file
from evaluation.problems import lines


def fetch(name: str, *, include: Sequence[Path] = ()) -> DataManifest:
    """Return the manifest of a benchmark whose data is there, fetching it unless it is.

    A benchmark is shipped, or a task of lm-eval, or one in the directories of `include`. What was fetched before is
    fetched again from the same commit. Refuses with BenchmarkError what is unknown, what cannot be fetched, and data
    other than the manifest says.
    """
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise BenchmarkError(f"{name!r} is no name of a benchmark: use one that relex benchmarks lists or lm-eval has.")
    task = (find_task(name, include=include) if include else None) or own_yaml(name, "")
    if task is None:
        raise BenchmarkError(
            f"{name} is not shipped and no task of lm-eval: correct the name, or pass its directory as --include-path."
        )
    recipe = recipe_of(read_yaml(task), task)
    directory = data_directory() / name
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        known = read_manifest(name)
        if known is not None and known.recipe != recipe:
            # The task itself has changed: what was fetched was for another one.
            known = None
        if known is not None and _is_there(name, known):
            return known
        commit = known.commit if known is not None else _commit(recipe)
        loaded, left_out = prepare(recipe, _rows(recipe, commit))
        texts = {split: _text(name, problems) for split, problems in loaded.items()}
        splits = {
            split: Split(f"{split}.jsonl", hashlib.sha256(text.encode()).hexdigest(), len(loaded[split]))
            for split, text in texts.items()
        }
        manifest = DataManifest(str(task), recipe, commit, splits, left_out)
        if known is not None and known.splits != splits:
            raise BenchmarkError(
                f"{recipe['hub']} at commit {commit} gives {_digests(manifest)} and {directory / 'manifest.json'} says "
                f"{_digests(known)}: to take the data set as it is now, delete the manifest and fetch again."
            )
        for split, text in texts.items():
            write_file(directory / splits[split].file, text)
        write_file(directory / "manifest.json", manifest.to_json())
    return manifest


def _is_there(name: str, manifest: DataManifest) -> bool:
    try:
        verify(name, manifest)
    except BenchmarkError:
        return False
    return True


def _commit(recipe: Mapping[str, Any]) -> str:
    from huggingface_hub import HfApi

    # Parts of one data set share no problem only when they are parts of one commit.
    for manifest in filter(None, map(read_manifest, fetched_benchmarks())):
        if all(manifest.recipe[key] == recipe[key] for key in ("hub", "revision")):
            return manifest.commit
    try:
        return str(HfApi().dataset_info(recipe["hub"], revision=recipe["revision"]).sha)
    except (OSError, ValueError, httpx.HTTPError) as error:
        raise _failed(recipe, str(recipe["revision"]), error) from error


def _rows(recipe: Mapping[str, Any], commit: str) -> dict[str, Rows]:
    import datasets

    wanted = recipe.get("splits", recipe.get("split"))
    # Only what is kept stays on the disk.
    with TemporaryDirectory() as cache:
        try:
            loaded = datasets.load_dataset(
                recipe["hub"],
                recipe.get("config"),
                revision=commit,
                cache_dir=cache,
                **recipe.get("options", {}),
            )
        except (OSError, ValueError, RuntimeError, httpx.HTTPError, datasets.exceptions.DatasetsError) as error:
            raise _failed(recipe, commit, error) from error
        return {split: table.to_list() for split, table in loaded.items() if split in wanted}


def _text(name: str, problems: Rows) -> str:
    try:
        return lines(problems)
    except (TypeError, ValueError) as error:
        raise BenchmarkError(f"{name} is no text alone, {error}: it cannot be kept as JSON.") from error


def _digests(manifest: DataManifest) -> str:
    return ", ".join(f"{entry.file} sha256 {entry.sha256}" for entry in manifest.splits.values())


def _failed(recipe: Mapping[str, Any], revision: str, error: Exception) -> BenchmarkError:
    reason = next(iter(_reasons(error)), type(error).__name__)
    return BenchmarkError(
        f"{recipe['hub']} at {revision} cannot be fetched: {reason} Fetch where the Hub can be reached, and copy "
        f"{data_directory()} from there."
    )


def _reasons(error: Exception) -> Iterator[str]:
    for line in str(error).split("\n"):
        if line.strip():
            yield f"{line.strip().rstrip('.')}."
