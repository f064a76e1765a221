"""Versus: two models on the same problems, the paired comparison and the problems where they differ."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from evaluation.child import kept_children
from evaluation.verdict.differences import Difference, find_differences
from evaluation.verdict.gate import Gate, gate
from evaluation.verdict.looks import Look, spend
from evaluation.verdict.report import Evaluated, Report
from flows.console import plain_table, print_line

# Of a prompt or an answer, in characters: the end says most, since it holds the question and the result.
_LONGEST = 240
_HEAD = 60


@dataclass(frozen=True)
class Versus:
    """A candidate against a reference on one benchmark, and the problems on which they differ."""

    gate: Gate
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"gate": asdict(self.gate) | {"sentence": self.gate.sentence}} | {
            "differences": [asdict(each) for each in self.differences]
        }


@kept_children()
def compare_pair(
    models: Sequence[Path],
    evaluate: Callable[[Path], list[Evaluated]],
    *,
    margin: float,
    confidence: float,
    looks: Path,
) -> list[Versus]:
    """Return the first of two models against the second, one comparison a benchmark.

    Of the same two on more or fewer problems each is a further look; `looks` is the directory where they are counted.
    """
    candidate, reference = (evaluate(model) for model in models)

    def look(pair: Sequence[Report]) -> Look:
        of = sha256(" ".join(report.model_digest for report in pair).encode()).hexdigest()[:16]
        return spend(looks / f"{of}.json", pair, confidence=confidence)

    return [
        Versus(
            gate(
                ours.report,
                theirs.report,
                margin=margin,
                confidence=confidence,
                look=look([ours.report, theirs.report]),
            ),
            tuple(find_differences(ours, theirs)),
        )
        for ours, theirs in zip(candidate, reference, strict=True)
    ]


def show_versus(console: Console, pairs: Sequence[Versus], *, problems: int) -> None:
    """Print the paired comparisons, their verdicts, and at most `problems` problems of each that differ."""
    table = plain_table("benchmark", "n", "candidate", "reference", "wins", "losses", "difference", "interval")
    table.padding = 0
    for result in (each.gate for each in pairs):
        assert result.interval_low is not None
        assert result.interval_high is not None
        table.add_row(
            result.benchmark,
            str(result.n),
            f"{result.candidate_accuracy:.4f}",
            f"{result.reference_accuracy:.4f}",
            str(result.wins),
            str(result.losses),
            f"{result.difference:+.4f}",
            f"{result.interval_low:+.4f} {result.interval_high:+.4f}",
        )
    console.print(table)
    for each in pairs:
        print_line(console, each.gate.sentence)
        for difference in each.differences[:problems]:
            better = "candidate" if difference.candidate_score > difference.reference_score else "reference"
            console.print()
            print_line(console, f"problem {difference.problem} of {each.gate.benchmark}: the {better} is better")
            print_line(console, f"  prompt     {_cut(difference.prompt)}")
            print_line(console, f"  answer     {_cut(difference.target)}")
            for name, score, answers in (
                ("candidate", difference.candidate_score, difference.candidate_answers),
                ("reference", difference.reference_score, difference.reference_answers),
            ):
                print_line(console, f"  {name}  {score:.2f}  {' | '.join(map(_cut, answers[:2]))}{_more(answers)}")
        if hidden := len(each.differences[problems:]):
            console.print()
            print_line(console, f"{hidden} more problems of {each.gate.benchmark} differ: --problems or --json")


def _cut(text: str) -> str:
    line = " ".join(text.split())
    if len(line) <= _LONGEST:
        return line
    return f"{line[:_HEAD]} … {line[-(_LONGEST - _HEAD) :]}"


def _more(answers: Sequence[str]) -> str:
    return f" | and {len(answers) - 2} more" if len(answers) > 2 else ""
