"""Contents: what the problems of a benchmark say, as digests that other benchmarks' can be compared with.

A process of its own, `python -m evaluation.benchmarks.contents`, loads the benchmarks with lm-eval; no model is loaded.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from evaluation.child import Send, run_as_child
from evaluation.digest import digest_value
from evaluation.files import write_file

# Shorter texts of a document say little by themselves: an answer, a source, a level.
SHORTEST_TEXT = 24
LONGEST_TITLE = 80


@dataclass(frozen=True)
class Problem:
    """One problem: its text cut to a readable length, and sha256 (hex) of its prompt, then of each text it alone has.

    Texts are compared with case and runs of white space folded.
    """

    title: str
    digests: tuple[str, ...]


@dataclass(frozen=True)
class Contents:
    """The problems of one benchmark in its order."""

    benchmark: str
    problems: tuple[Problem, ...]

    def write(self, path: Path) -> None:
        """Write the contents so that `path` is complete or absent."""
        write_file(path, json.dumps(dataclasses.asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return what `write` wrote."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        problems = tuple(Problem(each["title"], tuple(each["digests"])) for each in fields["problems"])
        return cls(fields["benchmark"], problems)


def describe(benchmark: str, prompts: Sequence[object], documents: Sequence[Mapping[str, object]]) -> Contents:
    """Return the contents of a benchmark whose problems are `documents`, rendered as `prompts`.

    A text that several different problems of the benchmark have, such as an instruction, tells none of them.
    """
    digests: list[list[str]] = []
    owners: dict[str, set[str]] = defaultdict(set)
    titles = []
    for prompt, document in zip(prompts, documents, strict=True):
        # Some tasks have no prompt of one text: the whole document stands for it.
        folded = fold(prompt) if isinstance(prompt, str) else ""
        folded = folded or fold(json.dumps(document, sort_keys=True, default=str))
        own = digest_value(folded)
        texts = {digest_value(text) for text in map(fold, _texts(document)) if len(text) >= SHORTEST_TEXT}
        for text in texts:
            owners[text].add(own)
        digests.append([own, *sorted(texts - {own})])
        titles.append(folded)
    return Contents(
        benchmark,
        tuple(
            Problem(_shorten(title), (own, *(text for text in texts if len(owners[text]) == 1)))
            for title, (own, *texts) in zip(titles, digests, strict=True)
        ),
    )


def fold(text: str) -> str:
    """Return the text with every run of white space as one space, without case."""
    return " ".join(text.split()).casefold()


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _texts(entry)


def _shorten(title: str) -> str:
    return title if len(title) <= LONGEST_TITLE else title[: LONGEST_TITLE - 1] + "…"


def _describe_all(line: bytes, _: Send, __: bool) -> None:
    from evaluation.benchmarks.lm_eval_task import load_any_task

    wanted: list[dict[str, Any]] = json.loads(line)
    for each in wanted:
        task = load_any_task(each["benchmark"], each["benchmark_path"])
        documents = list(task.eval_docs)
        prompts = [task.doc_to_text(document) for document in documents]
        # Two problems may have one answer, however long it is.
        asked = [_without(document, task.doc_to_target(document)) for document in documents]
        describe(each["benchmark"], prompts, asked).write(Path(each["path"]))


def _without(document: Mapping[str, object], target: object) -> dict[str, object]:
    return {name: value for name, value in document.items() if not isinstance(value, str) or value != target}


if __name__ == "__main__":
    run_as_child(_describe_all)
