"""How a re-grounding is shown: a table of its cycles and what they came to."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from flows.console import markdown_table, plain_table, print_warnings
from flows.reground.loop import Regrounding

HEADINGS = ("cycle", "start", "trained", "jumped", "accuracy", "with jump", "kept", "seconds")


def show(console: Console, found: Regrounding) -> None:
    """Print it on a terminal."""
    console.print(plain_table(*HEADINGS, rows=rows(found)))
    print_warnings(console, [text for cycle in found.cycles for text in cycle.warnings])
    for line in summary(found):
        console.print(line, soft_wrap=True, highlight=False)


def page(found: Regrounding) -> str:
    """Return it as Markdown."""
    lines = [f"# {found.training_run}: re-grounding", "", *(f"{line}  " for line in summary(found)), ""]
    lines += markdown_table(HEADINGS, rows(found))
    for cycle in found.cycles:
        lines += ["", f"- Cycle {cycle.number}: {cycle.reason}", *(f"  - Warning: {text}" for text in cycle.warnings)]
    return "\n".join(lines) + "\n"


def rows(found: Regrounding) -> list[tuple[str, ...]]:
    """Return one row a cycle under HEADINGS; start is the step it starts from, seconds are of training."""
    return [
        (
            str(cycle.number),
            str(cycle.start_step),
            str(cycle.real_steps),
            str(cycle.jumped_steps),
            f"{cycle.observed_accuracy:.4f}",
            "—" if cycle.jumped_accuracy is None else f"{cycle.jumped_accuracy:.4f}",
            "yes" if cycle.jumped_steps else "no",
            f"{cycle.training_seconds:.0f}",
        )
        for cycle in found.cycles
    ]


def summary(found: Regrounding) -> list[str]:
    """Return in a few lines where it is, what it cost and what it saved."""
    content = found.to_json()
    start = found.start
    lines = [
        f"Accuracy {start.accuracy:.4f} → {found.accuracy:.4f} on {start.n} problems of {start.benchmark}, step"
        f" {found.step}: {found.real_steps} steps trained in {found.training_seconds:.0f} s, {content['jumped_steps']}"
        f" jumped; predicting and scoring took {found.other_seconds:.0f} s.",
        *_saved(found, content),
        f"Ended: {found.ended}." if found.ended else "More cycles follow.",
        f"Model: {found.model}",
    ]
    return lines


def _saved(found: Regrounding, content: Mapping[str, Any]) -> list[str]:
    if found.reference is None or "saved_steps" not in content:
        return []
    text = f"Plain RL took {found.reference.steps} steps to it: {content['saved_steps']} saved"
    if found.reference.seconds is not None:
        text += f", and {content['saved_seconds']:.0f} of {found.reference.seconds:.0f} s of training"
    return [f"{text}."]
