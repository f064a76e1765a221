"""How a re-grounding is shown: a table of its cycles and what they came to."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from flows.console import markdown_table, plain_table, print_warnings
from flows.reground.cycle import Cycle
from flows.reground.loop import Regrounding

HEADINGS = ("cycle", "start", "trained", "jumped", "accuracy", "with jump", "kept", "answers", "seconds")


def show(console: Console, regrounding: Regrounding) -> None:
    """Print it on a terminal."""
    console.print(plain_table(*HEADINGS, rows=rows(regrounding)))
    print_warnings(console, [text for cycle in regrounding.cycles for text in cycle.warnings])
    for line in summary(regrounding):
        console.print(line, soft_wrap=True, highlight=False)


def page(regrounding: Regrounding) -> str:
    """Return it as Markdown."""
    lines = [f"# {regrounding.training_run}: re-grounding", "", *(f"{line}  " for line in summary(regrounding)), ""]
    lines += markdown_table(HEADINGS, rows(regrounding))
    for cycle in regrounding.cycles:
        lines += ["", f"- Cycle {cycle.number}: {cycle.reason}", *(f"  - Warning: {text}" for text in cycle.warnings)]
        lines += [f"  - {_ladder(cycle)}"] if cycle.ladder else []
    return "\n".join(lines) + "\n"


def rows(regrounding: Regrounding) -> list[tuple[str, ...]]:
    """Return one row a cycle under HEADINGS.

    Start is the step it starts from, answers are those that its ladder cost, seconds are of training.
    """
    return [
        (
            str(cycle.number),
            str(cycle.start_step),
            str(cycle.real_steps),
            str(cycle.jumped_steps),
            f"{cycle.observed_accuracy:.4f}",
            "—" if cycle.jumped_accuracy is None else f"{cycle.jumped_accuracy:.4f}",
            "yes" if cycle.jumped_steps else "no",
            str(cycle.answers or "—"),
            f"{cycle.training_seconds:.0f}",
        )
        for cycle in regrounding.cycles
    ]


def summary(regrounding: Regrounding) -> list[str]:
    """Return in a few lines where it is, what it cost and what it saved."""
    content = regrounding.to_json()
    start = regrounding.start
    lines = [
        f"Accuracy {start.accuracy:.4f} → {regrounding.accuracy:.4f} on {start.n} problems of {start.benchmark}, step"
        f" {regrounding.step}: {regrounding.real_steps} steps trained in {regrounding.training_seconds:.0f} s,"
        f" {content['jumped_steps']} jumped; predicting and scoring took {regrounding.other_seconds:.0f} s.",
        *_saved(regrounding, content),
        f"Ended: {regrounding.ended}." if regrounding.ended else "More cycles follow.",
        f"Model: {regrounding.model}",
    ]
    return lines


def _ladder(cycle: Cycle) -> str:
    """Return the rungs in a line; ↓ marks what fell below the best before it."""
    climbed = ", ".join(f"{rung.step}: {rung.accuracy:.4f}{' ↓' if rung.worse else ''}" for rung in cycle.ladder)
    return f"Ladder of {cycle.method}, {cycle.answers:,} answers, first {cycle.ladder[0].n} problems: {climbed}."


def _saved(regrounding: Regrounding, content: Mapping[str, Any]) -> list[str]:
    if regrounding.reference is None or "saved_steps" not in content:
        return []
    text = f"Plain RL took {regrounding.reference.steps} steps to it: {content['saved_steps']} saved"
    if regrounding.reference.seconds is not None:
        text += f", and {content['saved_seconds']:.0f} of {regrounding.reference.seconds:.0f} s of training"
    return [f"{text}."]
