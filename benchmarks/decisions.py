"""What is decided on real tiny runs when 5, 10 and 20 % of their steps are observed, and when the backtest has
converged (window auto, at 20 % at the latest), against what came later, and what each rule of stopping would have cost.

Trains what the cache lacks of the runs of benchmarks/runs.py, makes each decision as the watcher would, with targets
and methods left to the backtest, and scores on the report problems, which decide nothing: the real checkpoints, plain
RELEX at the run's end, and what was registered. A decision is one small file in --results, so a call after a kill, or
for other runs and windows, goes on with what is missing; decisions.md there is the table of all that is finished. Every
run is kept as finished runs are: `relex status --record` of a relex.yaml with `state: OUT/finished` lists them. --keep
writes the Grams of the runs that the tests read.

    python -m benchmarks.decisions --cache runs --out decisions --results benchmarks/results/decisions --shares 5 20
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

# Before anything imports torch: the threads of a model this small only fight each other.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
import yaml

from benchmarks.runs import FRESH, RUNS, Run, held_out, keep_gram, train
from evaluation.child import kept_children
from evaluation.verdict.gate import gate
from evaluation.verdict.report import Report
from flows.decide.predict import predict, write_rungs
from flows.decide.procedure import Stages, decide
from flows.decide.score import reports
from flows.decide.stages import count_problems, diverge_models, gate_model, guard_model
from flows.search.ladder import Answered, answered, score
from flows.settings import Settings, load_settings
from flows.state.decision import Decision, Model, Score
from flows.state.finished import RISK, Finished, keep_finished, vote
from flows.state.records import read_json, write_json
from flows.state.windows import decided, decision_path, read_decisions, window_key
from flows.stop.outlook import EVIDENCE, outlook
from flows.stop.status import unmet
from relex.backtest.convergence import converge
from relex.drift import write_as_predicted
from relex.extrapolation import extrapolate_run
from relex.gram import cached
from relex.predictors import parse_method
from relex.store import Checkpoint, State, open_base, scan
from relex.trajectory import open_run

SHARES = ("5", "10", "20", "auto")
# So many windows share the gate's error: those of the shares, and what is due by itself.
LOOKS = len(SHARES)
# Relex's own default, in points.
PRICE = 2.0


@dataclass(frozen=True)
class Point:
    """Plain RELEX at one step: accuracy on the report problems.

    `observed_is_better` says whether the last observed checkpoint is shown to be better (paired, one-sided 95 %).
    """

    step: int
    accuracy: float
    observed_is_better: bool


@dataclass(frozen=True)
class Row:
    """One window of one run of `steps` steps: what was observed, what was decided, and what came of it.

    Accuracies are on `n` report problems. `chosen` is of what one is left with after `model` was registered (empty:
    nothing was), `real` of the run itself at that step and `end` at its end, None where it was not trained so far.
    `wrong` is a wrong yes: the last observed checkpoint is shown to be better than what was registered (paired,
    one-sided 95 %). Choosing cost `answers`. `offered` says that a stop was, `rules` what each rule says that training
    on may win, in points.
    """

    run: str
    name: str
    task: str
    fresh: str
    share: str
    key: str
    window: int
    steps: int
    n: int
    observed: float
    plain: Point
    verdict: str
    reason: str
    model: str
    chosen: float
    real: float | None
    end: float | None
    wrong: bool
    answers: int
    seconds: float
    offered: bool
    rules: dict[str, float]

    @property
    def cost(self) -> float | None:
        """The real end less what was registered, in points; None where nothing was, or the end is not known."""
        return None if self.end is None or not self.model else 100 * (self.end - self.chosen)

    @property
    def finished(self) -> Finished | None:
        """The row as the record of finished runs has it."""
        if self.end is None or not self.model:
            return None
        benchmark = f"{self.task}-report"
        return Finished(
            self.name, self.key, self.window, self.steps, benchmark, self.n, self.chosen, self.end, self.rules
        )


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
    guard=guard_model,
    divergence=diverge_models,
)


def due(run: Run, root: Path, grams: Path) -> int:
    """Return the window that is due by itself: three looks that agree, or 20 %."""
    last = run.steps * 20 // 100
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
def measure(run: Run, root: Path, out: Path, share: str) -> Row:
    """Decide one window of a run, and return what came of it."""
    window = due(run, root, out / "state" / run.name / "grams") if share == "auto" else run.steps * int(share) // 100
    config = prepare(run, root, out, window)
    settings = load_settings(config)
    made = decision(settings, SHARES.index(share) + 1)

    def report(directory: Path) -> Report:
        return reports(settings, Model("observed", 0, str(directory)), settings.report)[0]

    def real(step: int) -> Report | None:
        copy = written_as_predicted(settings, step, out / "real" / run.name)
        return None if copy is None else report(copy)

    observed, end = real(window), real(run.steps)
    assert observed is not None
    plain = report(predicted_at(settings, run.steps, out / "plain"))
    model, chosen, reached = "", observed, None
    if made.verdict == "registered" and made.winner is not None:
        model, chosen = made.winner.title, report(Path(made.winner.directory))
        reached = real(-(-made.winner.step // run.save_steps) * run.save_steps)
    answers, seconds = made.cost
    return Row(
        run=run.title,
        name=run.name,
        task=run.task,
        fresh=run.fresh,
        share=share,
        key=made.key,
        window=window,
        steps=run.steps,
        n=observed.n,
        observed=observed.accuracy,
        plain=Point(run.steps, plain.accuracy, _is_better(observed, plain)),
        verdict=made.verdict,
        reason=made.reason,
        model=model,
        chosen=chosen.accuracy,
        real=None if reached is None else reached.accuracy,
        end=None if end is None else end.accuracy,
        wrong=bool(model) and _is_better(observed, chosen),
        answers=answers,
        seconds=seconds,
        offered=bool(model) and not unmet(config, settings, made),
        rules={str(rule): points for rule, points in outlook(settings, made).items()},
    )


def written_as_predicted(settings: Settings, step: int, out: Path) -> Path | None:
    """Return a real checkpoint as a model directory, an adapter merged, written once; None where there is none."""
    base = open_base(settings.base)
    for stored in scan(settings.store, base, now=time.time()):
        if stored.step == step and stored.state is State.READY and stored.weights is not None:
            place = out / f"step-{step}"
            write_as_predicted(base, Checkpoint(step, stored.weights), place, memory=1 << 30, threads=1)
            return place
    return None


def predicted_at(settings: Settings, target: int, out: Path) -> Path:
    """Return the directory of plain RELEX at a target step, written once."""
    made = extrapolate_run(
        settings.checkpoints,
        settings.base,
        targets=[target],
        out=out / settings.training_run / f"window-{settings.end}",
        window=settings.end,
        method=parse_method("relex"),
        memory=int(settings.memory),
        threads=1,
        grams=settings.home / "grams",
        staging=out,
    )
    return next(map(Path, made))


def _is_better(candidate: Report, reference: Report) -> bool:
    return gate(candidate, reference, margin=0.0).passed


def decision_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the table of what was decided, and of what each rule would have done; a wrong yes is flagged."""
    yield f"Accuracies on {rows[0].n} report problems. ↓: the last observed checkpoint is better (paired, 95 %)."
    yield f"A rule's entry is the points that it says training on may win; bold: it stops, at a price of {PRICE:g};"
    yield "costly: and stopping there costs more."
    yield ""
    heads = ["run", "window", "plain RELEX to the end", "last observed → registered @ step", "real there", "real end"]
    heads += ["answers", "a stop costs (points), saves (steps)", "stop offered", *EVIDENCE]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for row in rows:
        registered = f"{row.chosen:.3f} (`{row.model}`)" if row.model else "keep training"
        cells = [
            row.run,
            f"{row.window} ({row.share} %)" if row.share != "auto" else f"{row.window} (auto)",
            f"{row.plain.accuracy:.3f}{' ↓' if row.plain.observed_is_better else ''}",
            f"{row.observed:.3f} → {registered}{' **wrong yes**' if row.wrong else ''}",
            "–" if row.real is None else f"{row.real:.3f}",
            "–" if row.end is None else f"{row.end:.3f}",
            f"{row.answers}",
            "–" if row.cost is None else f"{row.cost:+.1f}, {row.steps - row.window}",
            "yes" if row.offered else "no",
            *(_rule(row, rule) for rule in EVIDENCE),
        ]
        yield f"| {' | '.join(cells)} |"


def _rule(row: Row, rule: str) -> str:
    if rule not in row.rules:
        return ""
    said = f"{row.rules[rule]:+.1f}"
    if row.rules[rule] > PRICE:
        return said
    return f"**{said}**{' costly' if (row.cost or 0.0) > PRICE else ''}"


def rule_table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield how each rule did on these rows, and what the record of finished runs lets it do."""
    yield f"How often each rule stops at a price of {PRICE:g} points, and what conformal voting allows it after these."
    yield ""
    yield "| rule | looks at which it says something | stops | costly | worst (points) | steps saved | allowed up to |"
    yield "|---|---|---|---|---|---|---|"
    runs = record(rows)
    for rule in EVIDENCE:
        known = [row for row in rows if row.cost is not None and rule in row.rules]
        stops = [row for row in known if row.rules[rule] <= PRICE]
        costs = [row.cost for row in stops if row.cost is not None]
        allowed = vote(runs, rule, price=PRICE)
        yield (
            f"| {rule} | {len(known)} | {len(stops)} | {sum(cost > PRICE for cost in costs)}"
            f" | {max(costs, default=0.0):+.1f} | {sum(row.steps - row.window for row in stops)}"
            f" | {'nothing' if allowed is None else f'{allowed:.1f} points'} |"
        )
    yield ""
    yield f"{len(runs)} finished runs; at most {100 * RISK:g} % of stops may be costly."


def record(rows: Sequence[Row]) -> list[tuple[Finished, ...]]:
    """Return the finished runs, each with its looks, the earliest first."""
    looks: dict[str, list[Finished]] = {}
    for row in sorted(rows, key=lambda row: row.window):
        if row.finished is not None:
            looks.setdefault(row.name, []).append(row.finished)
    return [tuple(each) for each in looks.values()]


def tables(rows: Sequence[Row]) -> str:
    """Return the tables of the fresh runs and of those that the rules were fixed on."""
    parts = []
    for title, part in (
        ("Fresh runs", [row for row in rows if row.fresh]),
        ("The runs that the constants were fixed on", [row for row in rows if not row.fresh]),
    ):
        if part:
            parts += [f"## {title}", "", *decision_table(part), "", *rule_table(part), ""]
    return "\n".join(parts)


def read_rows(results: Path) -> list[Row]:
    """Return the rows that are finished, in the order of the runs."""
    order = [run.name for run in (*FRESH, *RUNS)]
    rows = [read_json(path, Row) for path in results.glob("*.json")]
    return sorted(rows, key=lambda row: (order.index(row.name), SHARES.index(row.share)))


def main() -> None:
    """Decide what is asked for and not decided yet; write the tables of all that is."""
    runs = {run.name: run for run in (*FRESH, *RUNS)}
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="directory for the training runs, reused")
    parser.add_argument("--out", type=Path, required=True, help="directory for what is predicted and scored")
    parser.add_argument("--results", type=Path, required=True, help="directory for a small file a decision")
    parser.add_argument("--shares", nargs="+", default=list(SHARES), choices=SHARES, help="windows, in per cent")
    parser.add_argument("--runs", nargs="+", default=list(runs), choices=list(runs), metavar="NAME")
    parser.add_argument("--keep", type=Path, help="directory for the Grams of the runs that the tests read")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    out = chosen.out.absolute()
    for name in chosen.runs:
        run = runs[name]
        root = train(chosen.cache.absolute(), run)
        rows = [decided_row(run, root, out, share, chosen.results) for share in chosen.shares]
        (chosen.results / "decisions.md").write_text(tables(read_rows(chosen.results)), encoding="utf-8")
        print("\n".join(decision_table(rows)), flush=True)
        # Beside the state of the decisions: no run's record has a say in another's here.
        settings = load_settings(prepare(run, root, out, rows[0].window))
        for looks in record([row for row in read_rows(chosen.results) if row.name == name]):
            keep_finished(settings.model_copy(update={"state": out / "finished"}), looks)
        if chosen.keep is not None and run.kept:
            whole = open_run(root / "run", root / "base", window=None)
            gram = cached(whole, out / "state" / run.name / "grams", memory=1 << 30, threads=1)
            keep_gram(gram, chosen.keep / f"{run.name}.safetensors")
            content = {
                "run": asdict(run) | {"dtype": str(run.dtype)},
                "windows": [asdict(row) | {"relex": [asdict(row.plain)]} for row in rows],
            }
            write_json(chosen.keep / f"{run.name}.json", content)


def decided_row(run: Run, root: Path, out: Path, share: str, results: Path) -> Row:
    """Return one window of a run, measured where its file is not there, or was before the run had come to its end."""
    file = results / f"{run.name}-{share}.json"
    if not file.exists() or read_json(file, Row).end is None:
        results.mkdir(parents=True, exist_ok=True)
        write_json(file, asdict(measure(run, root, out, share)))
        file.chmod(0o644)
    return read_json(file, Row)


if __name__ == "__main__":
    main()
