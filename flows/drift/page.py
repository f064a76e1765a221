"""How old predictions and what the run really reached are shown: one table, and one sentence on what to do."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console

from flows.console import markdown_table, print_fitting, print_warnings
from flows.drift.due import Waiting
from flows.drift.record import Compared
from flows.settings import Settings
from flows.state.scored import Scored, scored_directory

HEADINGS = ("prediction", "from", "real step", "skill", "expected", "cosine", "norm/real", "real norm", "verdict")


def show(console: Console, rows: Sequence[Compared], waiting: Sequence[Waiting]) -> None:
    """Print it on a terminal."""
    rows = _registered_first(rows)
    for line in overtaken(rows):
        console.print(line, soft_wrap=True, highlight=False)
    if rows:
        # What came of each first, then the numbers.
        print_fitting(console, HEADINGS, [cells(row) for row in rows], [0, 2, 7, 8], [0, 1, 3, 4, 5, 6])
    for line in (*_accuracies(rows), *_waiting(waiting)):
        console.print(line, soft_wrap=True, highlight=False)
    print_warnings(console, list(warnings(rows)))
    console.print(summary(rows), soft_wrap=True, highlight=False)


def to_json(training_run: str, rows: Sequence[Compared], waiting: Sequence[Waiting]) -> dict[str, Any]:
    """Return it as plain JSON types."""
    return {
        "training_run": training_run,
        "overtaken": overtaken(rows),
        "summary": summary(rows),
        "compared": [asdict(row) | {"verdict": verdict(row)} for row in rows],
        "waiting": [asdict(row) for row in waiting],
    }


def page(training_run: str, rows: Sequence[Compared]) -> str:
    """Return it as Markdown."""
    rows = _registered_first(rows)
    lines = [f"# {training_run}: predictions and reality", "", summary(rows), ""]
    lines[2:2] = [text for line in overtaken(rows) for text in (line, "")]
    lines += [*(f"- Warning: {text}" for text in warnings(rows)), ""]
    lines += markdown_table(HEADINGS, map(cells, rows))
    lines += [
        "",
        "Skill is of the weights against holding the last observed checkpoint (1: exact, 0: no better); expected is"
        " what the backtest said of the next jump if the run goes on as it did (95 %). The real norm is in the band of"
        " 90 % that was predicted, or outside.",
        *(f"\n{line}" for line in _accuracies(rows)),
    ]
    return "\n".join(lines) + "\n"


def cells(row: Compared) -> tuple[str, ...]:
    """Return one row under HEADINGS."""
    measured = row.drift
    band = {None: "", True: "in band", False: "outside"}[measured.in_band] if measured is not None else ""
    numbers = (None, None, None) if measured is None else (measured.skill, measured.cosine, measured.norm_ratio)
    skill, cosine, ratio = ("—" if value is None else f"{value:.2f}" for value in numbers)
    promised = "—" if row.promised is None else f"≥{row.promised:.2f}"
    return (row.title, str(row.observed), str(row.step), skill, promised, cosine, ratio, band, verdict(row))


def verdict(row: Compared) -> str:
    """Return what came of a prediction, in a few words."""
    if row.drift is None:
        return "cannot be compared"
    if row.drift.skill is None:
        return "the run stood still"
    if row.broken:
        return "worse than expected"
    if row.promised is not None:
        return "as expected"
    return "nearer than waiting" if row.drift.skill > 0 else "no nearer than waiting"


def observed(settings: Settings, rows: Sequence[Scored]) -> list[str]:
    """Return what observed checkpoints score on the selection problems, by step, the best marked; then what cannot."""
    scores = [row.score for row in rows if row.score is not None]
    if not scores:
        return [f"step {row.step} cannot be scored: {row.problem}" for row in rows]
    best = max(scores, key=lambda score: (score.accuracy, -score.model.step))
    accuracies = ", ".join(
        f"step {score.model.step} {score.accuracy:.4f}{' (the best)' * (score == best)}" for score in scores
    )
    kept = scored_directory(settings)
    where = f"Observed checkpoints on {best.n} problems of {best.benchmark}: {accuracies}. Kept in {kept}."
    return [where, *(f"step {row.step} cannot be scored: {row.problem}" for row in rows if row.problem)]


def overtaken(rows: Sequence[Compared | Scored]) -> list[str]:
    """Return one line for each registered version that a real checkpoint beats, of several the last."""
    beaten = {against.registered: against for row in rows if (against := row.overtaken) is not None}
    return [against.sentence for against in sorted(beaten.values(), key=lambda against: -against.step)]


def warnings(rows: Sequence[Compared]) -> list[str]:
    """Return one line for each prediction that is worse than was expected, or that cannot be compared."""
    incomparable = [f"{row.title} cannot be compared: {row.problem}" for row in rows if row.problem]
    return incomparable + [
        f"{row.title}, from step {row.observed}, is worse than expected: at step {row.step} its skill is"
        f" {row.drift.skill:.2f}, and at least {row.promised:.2f} was expected"
        for row in rows
        if row.broken and row.drift is not None
    ]


def summary(rows: Sequence[Compared]) -> str:
    """Return what to do, in one sentence."""
    if not rows:
        return "No prediction has been compared with what the run reached."
    promised = [row for row in rows if row.promised is not None and row.drift is not None]
    worse = [row for row in rows if row.broken]
    if not worse:
        fell = f"none of the {len(promised)} of which a skill was expected fell short"
        kept = fell if promised else "nothing was expected"
        return f"{_count(len(rows), 'prediction was', 'predictions were')} compared with what the run reached: {kept}."
    last = max(row.observed for row in worse)
    registered = ", ".join(dict.fromkeys(row.registered for row in worse if row.registered))
    use = f"do not promote {registered} (roll back where that is done), " if registered else ""
    return (
        f"{len(worse)} of {_count(len(promised), 'prediction was', 'predictions were')} worse than expected: the run"
        f" has left the line it was on up to step {last}, so {use}trust no later target of that window, train on, and"
        " decide again on a later one."
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _named(row: Compared) -> str:
    return f"{row.registered} ({row.title})" if row.registered else row.title


def _registered_first(rows: Sequence[Compared]) -> list[Compared]:
    return sorted(rows, key=lambda row: not row.registered)


def _accuracies(rows: Sequence[Compared]) -> list[str]:
    return [
        f"{_named(row)} scores {pair.predicted:.4f} on {pair.n} problems of {pair.benchmark}, real step {row.step}"
        f" {pair.real:.4f}: {pair.difference:+.4f} ({pair.low:+.4f} to {pair.high:+.4f}, 95 %)."
        for row in rows
        for pair in row.accuracies
        if row.overtaken is None or pair != row.overtaken.pair
    ]


def _waiting(waiting: Sequence[Waiting]) -> list[str]:
    reasons = dict.fromkeys(row.reason for row in waiting)
    return [
        f"not compared: {', '.join(f'{row.method} @ {row.target}' for row in waiting if row.reason == reason)}"
        f" ({reason})"
        for reason in reasons
    ]
