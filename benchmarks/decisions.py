"""What is decided on real tiny runs when 5, 10 and 20 % of their steps are observed, and when the backtest has
converged (window auto, at 20 % at the latest), against what came later.

Trains what the cache lacks of the runs of benchmarks/runs.py, makes each decision as the watcher would, with targets
and methods left to the backtest, and scores on the report problems, which decide nothing: the real checkpoints, plain
RELEX at 2, 4 and 8 times the window and at the run's end, and what was registered. Writes decisions.json and
decisions.md to --out; a second call trains and scores only what is missing. --keep writes the Grams of the runs that
the tests read.

    python -m benchmarks.decisions --cache ablation-runs --out decisions [--keep tests/relex/backtest/runs]
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Before anything imports torch: the threads of a model this small only fight each other.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

from benchmarks.runs import RUNS, Run, held_out, keep_gram, train
from evaluation.child import kept_children
from evaluation.verdict.gate import gate
from evaluation.verdict.report import Report
from flows.decide.predict import predict, write_rungs
from flows.decide.procedure import Stages, decide
from flows.decide.score import reports
from flows.decide.stages import count_problems, gate_model
from flows.search.ladder import Answered, answered, score
from flows.settings import Settings, load_settings
from flows.state.decision import Decision, Model, Score
from flows.state.records import write_json
from flows.state.windows import decided, decision_path, read_decisions, window_key
from flows.stop.status import unmet
from relex.backtest.backtest import Recommendation, backtest
from relex.backtest.convergence import converge
from relex.extrapolation import extrapolate_run
from relex.gram import cached
from relex.predictors import parse_method
from relex.store import open_base, scan
from relex.trajectory import open_run

SHARES = (5, 10, 20)
# So many windows share the gate's error: those of the shares, and what is due by itself.
LOOKS = len(SHARES) + 1
MULTIPLES = (2, 4, 8)
# Forms that are read at the run's end, beside plain RELEX and the last observed checkpoint.
FORMS = ("relex-pinned:damping=0.3", "saturating", "secant", "travel")
# Per cent of the run; every window that is a share is among them.
CURVE = (0, 5, 10, 20, 40, 60, 80, 100)


@dataclass(frozen=True)
class Point:
    """Plain RELEX at one step, and the real run there: accuracies on the report problems.

    `observed_is_better` says whether the last observed checkpoint is shown to be better (paired, one-sided 95 %).
    """

    step: int
    accuracy: float
    real: float
    observed_is_better: bool


@dataclass(frozen=True)
class Outcome:
    """A decision and what came of it: accuracies on the report problems.

    `chosen` is of what one is left with, registered or else last observed, `real` of the run itself at that step,
    `best` of the best that was scored. `trusted` says that the training would have been stopped. `wrong` is a wrong
    yes: the last observed checkpoint is shown to be better than what was registered (paired, one-sided 95 %).
    `costly` says that the run's real end is, so that stopping for it loses accuracy.
    """

    verdict: str
    model: str
    chosen: float
    real: float
    best: float
    trusted: bool
    wrong: bool
    costly: bool
    reason: str


@dataclass(frozen=True)
class Row:
    """One window of one run: what was observed, what plain RELEX makes of it, what the backtest says, the decision.

    `forms` are the accuracies of other forms at the run's end, by method.
    """

    run: str
    share: str
    window: int
    steps: int
    observed: float
    end: float
    relex: tuple[Point, ...]
    forms: dict[str, float]
    recommendation: Recommendation
    outcome: Outcome

    @property
    def regret(self) -> float | None:
        """The real end less what was registered; None when training goes on to it."""
        return self.end - self.outcome.chosen if self.outcome.verdict == "registered" else None

    @property
    def missed(self) -> float:
        """The best that was scored less what one is left with."""
        return self.outcome.best - self.outcome.chosen

    @property
    def saved(self) -> int:
        """Steps that are not trained when a trusted decision stops the run."""
        return self.steps - self.window if self.outcome.trusted else 0


def prepare(run: Run, root: Path, out: Path, window: int) -> Path:
    """Write the relex.yaml of one window and return its path."""
    splits = held_out(out / "benchmarks", run.task)
    content = {
        "training_run": run.name,
        "checkpoints": str(root / "run"),
        "base": str(root / "base"),
        "window": window,
        "targets": "auto",
        "methods": "auto",
        "total_steps": run.steps,
        "selection": str(splits["selection"]),
        "gate": str(splits["gate"]),
        "report": [str(splits["report"])],
        "registered_model": run.task,
        "state": str(out / "state"),
        "batch_size": 250,
        "memory": "1GiB",
        "threads": 1,
    }
    config = out / "configs" / f"{run.name}-{window}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return config


def find_base(settings: Settings) -> Model:
    return Model("base", 0, settings.base)


def score_model(settings: Settings, model: Model, benchmarks: list[str], limit: int | None) -> list[Score]:
    return [score(model, report) for report in reports(settings, model, benchmarks, limit=limit)]


def answer_model(settings: Settings, model: Model, limit: int | None) -> Answered:
    return answered(model, reports(settings, model, [settings.selection], limit=limit)[0])


# Without a server: there is no champion, and nothing is registered.
STAGES = Stages(
    problems=count_problems,
    predict=predict,
    write=write_rungs,
    answer=answer_model,
    base=find_base,
    score=score_model,
    champion=lambda _: [],
    gate=gate_model,
)


def due(run: Run, root: Path, grams: Path) -> int:
    """Return the window that is due by itself: three looks that agree, or 20 %."""
    last = run.steps * SHARES[-1] // 100
    for window in range(2 * run.save_steps, last, run.save_steps):
        trajectory = open_run(root / "run", root / "base", window=window)
        if converge(trajectory, cached(trajectory, grams, memory=1 << 30, threads=1)).converged:
            return trajectory.steps[-1]
    return last


def decision(settings: Settings, number: int) -> Decision:
    """Return what is decided; the windows share the gate's error, as those of one run do that is watched."""
    base = open_base(settings.base)
    inside = [
        checkpoint for checkpoint in scan(settings.store, base, now=time.time()) if checkpoint.step <= settings.end
    ]
    key = window_key(settings, base, inside)
    if decided(settings, key):
        return next(past for past in read_decisions(settings) if past.key == key)

    steps = [checkpoint.step for checkpoint in inside]
    made = decide(settings, steps, key, STAGES, attempt=(number, LOOKS))
    write_json(decision_path(settings, key), made.to_json())
    return made


@kept_children()
def measure(run: Run, root: Path, out: Path) -> tuple[dict[int, float], list[Row]]:
    """Return the accuracy of the run's real checkpoints by step, and a row for each window."""

    def report(settings: Settings, directory: Path) -> Report:
        return reports(settings, Model("observed", 0, str(directory)), settings.report)[0]

    def real(settings: Settings, step: int) -> Report:
        return report(settings, root / "run" / f"checkpoint-{step}" if step else root / "base")

    rows: list[Row] = []
    curve: dict[int, float] = {}
    windows = {f"{share} %": run.steps * share // 100 for share in SHARES}
    windows["auto"] = due(run, root, out / "state" / run.name / "grams")
    for number, (share, window) in enumerate(windows.items(), start=1):
        config = prepare(run, root, out, window)
        settings = load_settings(config)
        curve = curve or {step: real(settings, step).accuracy for step in [run.steps * share // 100 for share in CURVE]}
        observed = real(settings, window)
        points = tuple(
            Point(target, predicted.accuracy, real(settings, target).accuracy, _is_better(observed, predicted))
            for target, predicted in (
                (step, report(settings, path)) for step, path in plain(settings, run, out).items()
            )
        )
        forms = {
            method: report(settings, directory).accuracy
            for method in FORMS
            for directory in predicted_at(settings, out / "forms", method, [run.steps]).values()
        }
        looked = backtest(
            cached(
                open_run(settings.checkpoints, settings.base, window=window),
                settings.home / "grams",
                memory=int(settings.memory),
                threads=1,
            )
        )
        made = decision(settings, number)
        scored = [score.accuracy for score in made.report if score.model.role == "candidate"]
        best = max(observed.accuracy, *(point.accuracy for point in points), *scored)
        outcome = Outcome(
            made.verdict, "", observed.accuracy, observed.accuracy, best, False, False, False, made.reason
        )
        if made.verdict == "registered" and made.winner is not None:
            winner = report(settings, Path(made.winner.directory))
            reached = real(settings, -(-made.winner.step // run.save_steps) * run.save_steps)
            outcome = Outcome(
                made.verdict,
                made.winner.title,
                winner.accuracy,
                reached.accuracy,
                best,
                not unmet(config, settings, made),
                _is_better(observed, winner),
                _is_better(real(settings, run.steps), winner),
                made.reason,
            )
        rows.append(
            Row(
                run.title,
                share,
                window,
                run.steps,
                observed.accuracy,
                curve[run.steps],
                points,
                forms,
                looked.recommendation,
                outcome,
            )
        )
    return curve, rows


def plain(settings: Settings, run: Run, out: Path) -> dict[int, Path]:
    """Return the directories of plain RELEX by target step, written once."""
    targets = [*(settings.end * multiple for multiple in MULTIPLES if settings.end * multiple < run.steps), run.steps]
    return predicted_at(settings, out / "plain", "relex", targets)


def predicted_at(settings: Settings, out: Path, method: str, targets: Sequence[int]) -> dict[int, Path]:
    """Return the directories of a method's predictions by target step, written once."""
    parsed = parse_method(method)
    place = out / settings.training_run / f"window-{settings.end}"
    made = extrapolate_run(
        settings.checkpoints,
        settings.base,
        targets=targets,
        out=place if method == "relex" else place / parsed.directory,
        window=settings.end,
        method=parsed,
        memory=int(settings.memory),
        threads=1,
        grams=settings.home / "grams",
        staging=out,
    )
    return dict(zip(targets, map(Path, made), strict=True))


def _is_better(candidate: Report, reference: Report) -> bool:
    return gate(candidate, reference, margin=0.0).passed


def relex_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of plain RELEX; what is worse than the last observed checkpoint for sure is marked."""
    yield "Plain RELEX / the real run there; ↓: the last observed checkpoint is better (paired, one-sided 95 %)."
    yield ""
    yield "| run | window | last observed | 2 × | 4 × | 8 × | end | backtest |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in rows:
        by_target = {point.step: point for point in row.relex}
        targets = [*(row.window * multiple for multiple in MULTIPLES), row.steps]
        cells = [_cell(by_target[target]) if target in by_target else "" for target in targets]
        advice = row.recommendation
        said = "hold" if advice.way is None else f"`{advice.method}` from {advice.start}, to {advice.target_step}"
        yield f"| {row.run} | {_window(row)} | {row.observed:.3f} | {' | '.join(cells)} | {said} |"


def form_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of forms at the run's end."""
    yield "Every form at the run's end."
    yield ""
    yield f"| run | window | last observed | `relex` | {' | '.join(f'`{form}`' for form in FORMS)} | real end |"
    yield "|---" * (5 + len(FORMS)) + "|"
    for row in rows:
        plainly = next(point.accuracy for point in row.relex if point.step == row.steps)
        cells = " | ".join(f"{accuracy:.3f}" for accuracy in (row.observed, plainly, *row.forms.values(), row.end))
        yield f"| {row.run} | {_window(row)} | {cells} |"


def decision_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of what was decided; a wrong yes is flagged."""
    yield "What was decided, and the accuracy on report problems of what that leaves one with."
    yield "A stop is costly when the real end is shown to be better than what was registered (paired, one-sided 95 %)."
    yield ""
    yield (
        "| run | window | last observed | decision | chosen | real run there | real end | end - chosen | best - chosen"
        " | stop offered | steps saved |"
    )
    yield "|---" * 11 + "|"
    for row in rows:
        outcome = row.outcome
        said = f"`{outcome.model}`" if outcome.model else outcome.verdict
        regret = "" if row.regret is None else f"{row.regret:+.3f}"
        cells = [
            f"{row.run} | {_window(row)} | {row.observed:.3f}",
            f"{said}{' **wrong yes**' if outcome.wrong else ''}",
            f"{outcome.chosen:.3f} | {outcome.real:.3f} | {row.end:.3f} | {regret} | {row.missed:.3f}",
            f"{'yes' if outcome.trusted else 'no'}{', costly' if outcome.trusted and outcome.costly else ''}",
            f"{row.saved}",
        ]
        yield f"| {' | '.join(cells)} |"


def tables(rows: Sequence[Row]) -> str:
    return "\n".join([*relex_table(rows), "", *form_table(rows), "", *decision_table(rows)]) + "\n"


def _window(row: Row) -> str:
    return f"{row.window} ({row.share})"


def _cell(point: Point) -> str:
    return f"{point.accuracy:.3f}{' ↓' if point.observed_is_better else ''} / {point.real:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="directory for the training runs, reused")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results, and for what was scored")
    parser.add_argument("--keep", type=Path, help="directory for the Grams of the runs that the tests read")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    out = chosen.out.absolute()
    results: dict[str, Any] = {}
    rows: list[Row] = []
    for run in RUNS:
        root = train(chosen.cache.absolute(), run)
        curve, run_rows = measure(run, root, out)
        rows += run_rows
        content = {
            "run": asdict(run) | {"dtype": str(run.dtype)},
            "curve": curve,
            "windows": list(map(asdict, run_rows)),
        }
        results[run.name] = content
        print(tables(run_rows), flush=True)
        if chosen.keep is not None and run.kept:
            whole = open_run(root / "run", root / "base", window=None)
            gram = cached(whole, out / "state" / run.name / "grams", memory=1 << 30, threads=1)
            keep_gram(gram, chosen.keep / f"{run.name}.safetensors")
            write_json(chosen.keep / f"{run.name}.json", content)
    write_json(out / "decisions.json", results)
    text = tables(rows)
    (out / "decisions.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
