"""Problem: one line of local JSONL, a prompt and its answer, that lm-eval reads and a digest guards."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.digest import digest_file, digest_value
from evaluation.errors import BenchmarkError

if TYPE_CHECKING:
    import datasets


def problem_id(problem: Mapping[str, object]) -> str:
    """Return the sha256 (hex) of the problem's canonical JSON."""
    return digest_value(dict(problem))


def verify_data(path: Path, sha256: str) -> None:
    """Refuse with BenchmarkError data that is missing or whose sha256 (hex) is another than the benchmark states."""
    if not path.is_file():
        raise BenchmarkError(f"{path} does not exist: a benchmark's data lies beside its YAML, copy both.")
    found = digest_file(path)
    if found != sha256:
        raise BenchmarkError(
            f"{path} has sha256 {found} and its benchmark was written for {sha256}: "
            "restore the data, or write a benchmark of another name."
        )


def load_problems(config_source: str, data: str, sha256: str, **_: object) -> "dict[str, datasets.Dataset]":
    """Return the split `test` of the JSONL file `data`, a path relative to the YAML; lm-eval's `custom_dataset`.

    lm-eval passes the YAML's path as `config_source`, the keys of `dataset_kwargs`, and all its metadata.
    """
    import datasets

    path = Path(config_source).parent / data
    verify_data(path, sha256)
    lines = path.read_text(encoding="utf-8").splitlines()
    return {"test": datasets.Dataset.from_list([json.loads(line) for line in lines])}
