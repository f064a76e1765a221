"""Problem: one line of local JSONL, a question and its answer, that lm-eval reads and a digest guards."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.digest import digest_file, digest_value
from evaluation.errors import BenchmarkError

if TYPE_CHECKING:
    import datasets

# In which order problems are asked: of their ids, or of the file.
HASH, GIVEN = "hash", "given"


def problem_id(problem: Mapping[str, object]) -> str:
    """Return the sha256 (hex) of the problem's canonical JSON."""
    return digest_value(dict(problem))


def lines(problems: Iterable[Mapping[str, object]]) -> str:
    """Return canonical JSONL: a line a problem, keys in order; TypeError or ValueError if JSON cannot hold one."""
    return "".join(
        json.dumps(dict(problem), ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n" for problem in problems
    )


def verify_data(path: Path, sha256: str) -> None:
    """Refuse with BenchmarkError data that is missing or whose sha256 (hex) is another than the benchmark states."""
    if not path.is_file():
        raise BenchmarkError(f"{path} does not exist: a benchmark's data lies beside its YAML, copy both.")
    actual = digest_file(path)
    if actual != sha256:
        raise BenchmarkError(
            f"{path} has sha256 {actual} and its benchmark was written for {sha256}: "
            "restore the data, or write a benchmark of another name."
        )


def load_problems(
    config_source: str,
    data: str | Mapping[str, str],
    sha256: str | Mapping[str, str],
    *,
    order: str = HASH,
    asked: str = "test",
    **_: object,
) -> "dict[str, datasets.Dataset]":
    """Return the split `test` of the JSONL file `data`, or of each split its own; lm-eval's `custom_dataset`.

    The split that is `asked` is in the order of its problems' ids, unless `order` is GIVEN: the first n are a sample,
    where files have subject after subject. Another split, of examples, is in the order of its file.

    Paths are relative to the YAML. lm-eval passes the YAML's path as `config_source`, the keys of `dataset_kwargs`, and
    all its metadata.
    """
    if order not in {HASH, GIVEN}:
        raise BenchmarkError(f"dataset_kwargs of {config_source} has order {order} and must be {HASH} or {GIVEN}.")
    import datasets

    directory = Path(config_source).parent
    splits = {}
    for split, (name, digest) in files(data, sha256).items():
        verify_data(directory / name, digest)
        # Not splitlines: a problem may hold U+2028, which JSON leaves as it is.
        written = (directory / name).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        problems = [json.loads(line) for line in written]
        if order == HASH and split == asked:
            problems.sort(key=problem_id)
        splits[split] = datasets.Dataset.from_list(problems)
    return splits


def files(data: str | Mapping[str, str], sha256: str | Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return file name and sha256 (hex) of each split; both are given for one split `test`, or by split."""
    if isinstance(data, str) and isinstance(sha256, str):
        return {"test": (data, sha256)}
    if isinstance(data, Mapping) and isinstance(sha256, Mapping) and {*data} == {*sha256}:
        return {split: (data[split], sha256[split]) for split in data}
    raise BenchmarkError(f"dataset_kwargs has data {data} and sha256 {sha256}: give both once, or both for each split.")
