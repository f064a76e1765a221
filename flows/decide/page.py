"""The page of a decision: what was compared, every number with its interval, what was refused and why; its figure."""

import base64
from collections.abc import Sequence
from pathlib import Path

from prefect.artifacts import create_markdown_artifact, create_table_artifact

from evaluation.verdict.gate import Gate
from flows.console import markdown_table
from flows.settings import Settings
from flows.state.decision import Backtested, Decision, Model, Rung, Score
from flows.stop.outlook import Room
from relex import plots


def page(decision: Decision, settings: Settings, *, figure: str = "") -> str:
    """Return the decision as Markdown; `figure` is an image URI."""
    attempt = f", attempt {decision.attempt} of {decision.attempts}" if decision.attempts > 1 else ""
    chosen = decision.winner if decision.verdict == "registered" else None
    lines = [
        f"# {decision.training_run}: {decision.verdict}{f' {chosen.title}' if chosen else ''}",
        "",
        decision.reason,
        "",
        *([f"- Model: `{chosen.directory}`"] if chosen else []),
        f"- Base: `{settings.base}`",
        f"- Training run: `{settings.checkpoints}`, {len(decision.steps)} checkpoints observed, steps"
        f" {decision.steps[0]} to {decision.steps[-1]} (window {decision.window}{attempt})",
    ]
    if decision.registered:
        lines.append(f"- Registered: [{decision.registered}]({decision.registered_url})")
    if decision.record_url:
        lines.append(f"- Record: [MLflow run]({decision.record_url})")
    lines.append(f"- Next: {_next(decision, settings)}")
    lines += ["", *(f"- Warning: {text}" for text in decision.warnings)] if decision.warnings else []
    if decision.stop:
        lines += ["", decision.stop]
    if figure:
        lines += ["", f"![accuracy by training step]({figure})"]
    if decision.backtested is not None:
        lines += ["", "## Backtest (proposes)", "", *_backtested(decision.backtested)]
    lines += _ladder(decision)
    lines += _scores("Selection (chooses)", decision.selection)
    if overruled := _overruled(decision):
        lines += ["", overruled]
    lines += [] if decision.ladder else _scores("Given up on fewer problems", decision.dropped)
    if decision.gates:
        lines += ["", "## Gate (decides)", "", *_gates(decision)]
    if decision.divergence is not None:
        lines += ["", decision.divergence.sentence]
    if decision.guards:
        lines += ["", "## Guards (refuse)", "", *_guards(decision)]
    lines += _scores("Report (decides nothing)", decision.report)
    return "\n".join(lines) + "\n"


def _next(decision: Decision, settings: Settings) -> str:
    if decision.verdict == "registered":
        named = " ".join(filter(None, [settings.registered_model, decision.registered.rpartition(" ")[2]]))
        return f"`relex promote {named}` makes it the champion"
    if decision.attempt < decision.attempts:
        return f"the training goes on; a later window is decided by itself, attempt {decision.attempt + 1}"
    return "the training goes on; nothing is to be done here"


def _overruled(decision: Decision) -> str:
    """Return why something else was chosen than what the backtest trusts, where that is so."""
    winner, backtested = decision.winner, decision.backtested
    if winner is None or backtested is None:
        return ""
    scored = {score.model: score for score in (*decision.dropped, *decision.selection)}
    ours, limit = scored.get(winner), backtested.trusted_step
    if ours is None or (limit is not None and winner.step <= limit):
        return ""
    trusted = [
        score
        for model, score in scored.items()
        if limit is not None and model.role == "candidate" and model.step <= limit and score.n == ours.n
    ]
    bound = "no step" if limit is None else f"no step beyond {limit}"
    best = max(trusted, key=lambda score: score.accuracy, default=None)
    against = "" if best is None else f", and the best of those that it trusts, {best.model.title}, {best.accuracy:.4f}"
    return (
        f"The backtest, which reads weights alone, trusts {bound}. It proposes and scores choose: {winner.title} scores"
        f" {ours.accuracy:.4f} on {ours.n} selection problems{against}. Whether that holds on other problems is for the"
        " gate."
    )


def draw(
    decision: Decision,
    path: Path,
    *,
    earlier: Sequence[Decision] = (),
    later: Sequence[Score] = (),
    room: Room | None = None,
) -> Path | None:
    """Draw accuracy by training step on the first report benchmark to `path`; None when there is no such benchmark.

    `earlier` are the decisions on the run's former windows, whose observed checkpoints are drawn too, `later` is what
    the run really reached after the decision, `room` what training on may win.
    """
    if not decision.report:
        return None
    benchmark = decision.report[0].benchmark
    scores = [score for score in decision.report if score.benchmark == benchmark]
    observed = {
        score.model.step: score
        for each in (*earlier, decision)
        for score in each.report
        if score.benchmark == benchmark and score.model.role in ("base", "observed")
    }
    winner = decision.winner if decision.verdict == "registered" else None
    plots.accuracy_by_step(
        path,
        title=f"{decision.training_run}: {decision.verdict}",
        benchmark=f"{benchmark}, {scores[0].n} problems that decided nothing",
        window=(decision.steps[0], decision.steps[-1]),
        real=[_point(score) for _, score in sorted(observed.items())],
        predicted=[_point(score, winner) for score in scores if score.model.role == "candidate"],
        later=[_point(score) for score in later],
        room=None if room is None else (min(room.at_least, room.ceiling), room.ceiling),
    )
    return path


def _point(score: Score, winner: Model | None = None) -> plots.Point:
    return plots.Point(
        score.model.step, score.accuracy, score.standard_error, score.model.method, chosen=score.model == winner
    )


def show(decision: Decision, settings: Settings, figure: Path | None) -> None:
    """Put the decision where the Prefect UI shows it: a table and a page with the figure."""
    rows = [
        {"model": score.model.title, "benchmark": score.benchmark, "accuracy": f"{score.accuracy:.4f}", "n": score.n}
        for score in (*decision.selection, *decision.report)
    ]
    if rows:
        create_table_artifact(rows, key=f"scores-{decision.training_run}", description=decision.reason)
    uri = f"data:image/png;base64,{base64.b64encode(figure.read_bytes()).decode()}" if figure is not None else ""
    create_markdown_artifact(
        page(decision, settings, figure=uri), key=f"decision-{decision.training_run}", description=decision.reason
    )


def _backtested(backtested: Backtested) -> list[str]:
    sentences = {
        "trusted": f"Trusted up to step {backtested.trusted_step}: ",
        "unsettled": "Not settled, so that no target is trusted: ",
        "hidden": "The weights cannot tell, so that no target is trusted: ",
        "hold": "Hold, no target is trusted: ",
    }
    return [f"{sentences[backtested.state]}{backtested.reason}"]


def _ladder(decision: Decision) -> list[str]:
    """Return the rungs that were climbed, a row a target; ↓ marks what fell below the best before it."""
    if not decision.ladder:
        return []
    headings, rows = rungs(decision.ladder)
    answers, seconds = decision.cost
    text = (
        f"Accuracy on the first {decision.ladder[0].n} selection problems, rung by rung. ↓ is worse than the best below"
        " it by more than two standard errors; after two in a row a direction ends, and what lies beyond was never"
        f" predicted. Choosing cost {answers:,} answers, {seconds:,.0f} s in the models."
    )
    return ["", "## Ladder (climbs)", "", text, "", *markdown_table(headings, rows)]


def rungs(ladder: Sequence[Rung]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the headings and rows of a ladder's table: a row a target, a column a method."""
    methods = list(dict.fromkeys(rung.method for rung in ladder))
    rung_at = {(rung.step, rung.method): rung for rung in ladder}
    rows = [
        (str(step), *(_rung(rung_at.get((step, method))) for method in methods))
        for step in sorted({rung.step for rung in ladder})
    ]
    return ("step", *methods), rows


def _rung(rung: Rung | None) -> str:
    return "" if rung is None else f"{rung.accuracy:.4f}{' ↓' if rung.worse else ''}"


def _gates(decision: Decision) -> list[str]:
    rows = [
        (
            gate.reference,
            f"{100 * gate.difference:+.2f}",
            _interval(gate),
            f"{100 * gate.lower_bound:+.2f}",
            f"{0.0 - 100 * gate.margin:g}",
            gate.verdict,
        )
        for gate in decision.gates
    ]
    headings = ("candidate against", "difference, points", "interval", "at least", "must be above", "")
    unsaid = [f"- {gate.sentence}" for gate in decision.gates if gate.sentence not in decision.reason]
    return [*markdown_table(headings, rows), *([""] if unsaid else []), *unsaid]


def _guards(decision: Decision) -> list[str]:
    rows = [
        (
            guard.benchmark,
            f"{100 * guard.difference:+.2f}",
            _interval(guard),
            f"{100 * guard.lower_bound:+.2f}",
            f"{-100 * guard.margin:g}",
            guard.verdict,
        )
        for guard in decision.guards
    ]
    against = f"{decision.guards[0].candidate} against {decision.guards[0].reference}: what it must not lose."
    headings = ("guard", "difference, points", "interval", "at least", "must be above", "")
    unsaid = [f"- {guard.sentence}" for guard in decision.guards if guard.sentence not in decision.reason]
    return [against, "", *markdown_table(headings, rows), *([""] if unsaid else []), *unsaid]


def _interval(gate: Gate) -> str:
    if gate.interval_low is None or gate.interval_high is None:
        return ""
    return f"{100 * gate.interval_low:+.2f} to {100 * gate.interval_high:+.2f}"


def _scores(title: str, scores: Sequence[Score]) -> list[str]:
    if not scores:
        return []
    headings = ["model", "benchmark", "accuracy", "95 % interval", "problems"]
    rows = [
        [
            score.model.title,
            score.benchmark,
            f"{score.accuracy:.4f}",
            f"{score.low:.4f} to {score.high:.4f}",
            str(score.n),
        ]
        for score in scores
    ]
    # Where the backtest promised nothing there is no column for it.
    promises = [score.model.skill_at_least for score in scores]
    if any(promise is not None for promise in promises):
        headings.append("skill of the weights at least")
        for row, promise in zip(rows, promises, strict=True):
            row.append("" if promise is None else f"{promise:.2f}")
    return ["", f"## {title}", "", *markdown_table(headings, rows)]
