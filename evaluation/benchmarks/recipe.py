"""Recipe: how a data set of the Hub becomes problems, as a task's YAML says.

A shipped benchmark has it in its metadata: `hub` and `revision`; `split`, the first of these that there is; `problem`,
the first of these columns; the answer in the column `answer`, or in the last box of the column `boxed_in`; and perhaps
a `part`. Of any other lm-eval task all splits that it reads are kept as they are.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluation.errors import BenchmarkError
from evaluation.grading.score import last_boxed

Rows = list[dict[str, Any]]
SPLITS = ("test_split", "validation_split", "training_split", "fewshot_split")


def recipe_of(config: Mapping[str, Any], task: Path) -> dict[str, Any]:
    """Return the recipe of a task YAML as `read_yaml` returns it; BenchmarkError when its data is not on the Hub."""
    own = (config.get("metadata") or {}).get("recipe")
    if own is not None:
        return dict(own)
    hub = config.get("dataset_path")
    if not isinstance(config.get("task"), str) or not isinstance(hub, str) or "custom_dataset" in config:
        raise BenchmarkError(f"{task} names no single data set of the Hub: pass the path of its YAML as the benchmark.")
    kwargs = {key: value for key, value in (config.get("dataset_kwargs") or {}).items() if key != "trust_remote_code"}
    if "data_files" in kwargs or hub.count("/") > 1:
        raise BenchmarkError(f"{task} reads data of its own, {hub}: pass the path of its YAML as the benchmark.")
    return {
        "hub": hub,
        "config": config.get("dataset_name"),
        "revision": kwargs.pop("revision", "main"),
        "splits": sorted({config[key] for key in SPLITS if isinstance(config.get(key), str)}),
        "options": kwargs,
    }


def prepare(recipe: Mapping[str, Any], rows: Mapping[str, Rows]) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """Return the problems by split, and the rows left out because they have no answer to grade by.

    Problems of a shipped benchmark have an `id` (split and row), the `problem` and its `answer`, all text, whatever the
    data set calls them. Refuses with BenchmarkError a data set without the columns or splits.
    """
    wanted = recipe.get("splits", recipe.get("split"))
    present = [split for split in wanted if split in rows]
    if not present or ("splits" in recipe and present != wanted):
        raise BenchmarkError(
            f"{recipe['hub']} has splits {', '.join(rows) or 'none'} of those that are read, {', '.join(wanted)}: "
            "it is another data set now, correct the task."
        )
    if "splits" in recipe:
        return {split: rows[split] for split in wanted}, ()
    split, table = present[0], rows[present[0]]
    column = _column(recipe, recipe["problem"], table)
    gold = _column(recipe, [recipe.get("boxed_in") or recipe["answer"]], table)
    problems: list[Mapping[str, str]] = []
    left_out = []
    for number, row in enumerate(table):
        answer = _boxed(row[gold]) if "boxed_in" in recipe else _answer(row[gold])
        if answer and str(row[column]).strip():
            problems.append({"id": f"{split}/{number}", "problem": str(row[column]), "answer": answer})
        else:
            left_out.append(f"{split}/{number}")
    if "part" in recipe:
        problems = part_of(problems, recipe["part"], recipe["of"])
    # lm-eval's split, whatever the data set calls it.
    return {"test": [dict(problem) for problem in problems]}, tuple(left_out)


def _column(recipe: Mapping[str, Any], names: Sequence[str], table: Rows) -> str:
    present = [name for name in names if table and name in table[0]]
    if not present:
        has = ", ".join(table[0]) if table else "no rows"
        raise BenchmarkError(f"{recipe['hub']} has {has} and {' or '.join(names)} is needed: its schema has changed.")
    return present[0]


def _answer(value: object) -> str:
    if isinstance(value, list):
        return _answer(value[0]) if value else ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _boxed(solution: str) -> str:
    # Some solutions use TeX's forms without braces, or another command for the same frame.
    solution = re.sub(r"\\boxed\s+([^\s${}\\.,]+)", r"\\boxed{\1}", solution.replace(r"\fbox", r"\boxed"))
    return (last_boxed(solution) or "").strip()


def part_of(problems: Sequence[Mapping[str, str]], part: str, count: int) -> list[Mapping[str, str]]:
    """Return the problems whose text is among the `count` distinct texts of least sha256 (`least`), or the `rest`.

    Case and runs of white space do not count, and of one text the first problem is taken: the two parts share no
    problem and have none twice, whatever their order.
    """
    distinct: dict[str, Mapping[str, str]] = {}
    for each in problems:
        text = " ".join(each["problem"].split()).casefold()
        distinct.setdefault(hashlib.sha256(text.encode()).hexdigest(), each)
    least = set(sorted(distinct)[:count])
    return [each for digest, each in distinct.items() if (digest in least) == (part == "least")]
