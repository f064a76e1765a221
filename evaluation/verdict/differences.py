"""Difference: a problem on which two models score differently, with what each answered."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.errors import ComparisonError
from evaluation.verdict.report import Evaluated
from evaluation.verdict.samples import read_samples


@dataclass(frozen=True)
class Difference:
    """One problem: its place in the benchmark, prompt and right answer; scores in 0..1 and answers, one a repeat."""

    problem: int
    prompt: str
    target: str
    candidate_score: float
    reference_score: float
    candidate_answers: tuple[str, ...]
    reference_answers: tuple[str, ...]


def find_differences(candidate: Evaluated, reference: Evaluated) -> list[Difference]:
    """Return the problems on which two models differ in the metric that decides, in the benchmark's order.

    Raises ComparisonError for samples of other problems; the reports say whether two evaluations can be compared.
    """
    metric = candidate.report.metric
    differences = []
    for ours, theirs in zip(_samples(candidate.samples), _samples(reference.samples), strict=True):
        if ours["doc_hash"] != theirs["doc_hash"]:
            raise ComparisonError(
                f"problem {ours['doc_id']} of {candidate.samples} is another than that of {reference.samples}:"
                " score both again."
            )
        if abs(ours[metric] - theirs[metric]) > 1e-9:
            differences.append(
                Difference(
                    problem=ours["doc_id"],
                    prompt=str(ours["arguments"]["gen_args_0"]["arg_0"]),
                    target=ours["target"],
                    candidate_score=float(ours[metric]),
                    reference_score=float(theirs[metric]),
                    candidate_answers=tuple(_flat(ours["resps"])),
                    reference_answers=tuple(_flat(theirs["resps"])),
                )
            )
    return differences


def _samples(path: Path) -> Iterator[dict[str, Any]]:
    # Of the first filter, as in the report.
    chosen = None
    for sample in read_samples(path):
        chosen = chosen or sample["filter"]
        if sample["filter"] == chosen:
            yield sample


def _flat(answers: Any) -> Iterator[str]:
    if isinstance(answers, list):
        for answer in answers:
            yield from _flat(answer)
    else:
        yield str(answers)
