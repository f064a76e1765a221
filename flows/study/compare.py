"""`relex compare`: what every method makes of the same observed steps, next to what the run really reached."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation.answers.fingerprint import LogitsExtrapolation
from evaluation.answers.harness import evaluate
from evaluation.child import kept_children
from evaluation.verdict.gate import gate
from evaluation.verdict.report import Report
from flows.study.comparison import Accuracy, Comparison, Role, Row, draw, page
from flows.study.resources import Resources
from relex.distance import Distance, along, distance, is_combination
from relex.errors import TargetError
from relex.extrapolation import Request, extrapolate
from relex.files.block_cache import BlockCache
from relex.forecast import Forecast
from relex.gram import Gram, cached
from relex.output.download import local_model
from relex.predictors import Method, parse_method
from relex.progress import Tell, telling
from relex.store import Checkpoint, observed, open_base, scan
from relex.trajectory import Trajectory, open_trajectory

# Two-sided: each end is the gate's one-sided bound at half of what is left.
CONFIDENCE = 0.95
# Any but 0, and the ends do not depend on it: where few problems differ it asks for the score interval. The exact test
# for 0 is conditional on how many differ, and as an interval it would end at the difference itself.
_MARGIN = 0.01
# Observed steps that are reconstructed, as parts of the window.
_PARTS = (1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class Plan:
    """What is compared: methods at steps beyond the window, which is all checkpoints up to `window` (None: all).

    `logits` adds Logits Extrapolation from the base through the last observed checkpoint, `reconstruct` observed steps
    as the leading directions hold them and as the fit of RELEX reads them.
    """

    methods: tuple[Method, ...]
    targets: tuple[int, ...]
    window: int | None = None
    logits: bool = False
    reconstruct: bool = False


@dataclass(frozen=True)
class Scoring:
    """On what models are scored, and how (see evaluation.answers.harness.evaluate)."""

    benchmarks: tuple[str, ...]
    device: str = "cpu"
    dtype: str = "auto"
    batch_size: int = 64
    limit: int | None = None


@dataclass(frozen=True)
class _Planned:
    role: Role
    name: str
    method: Method
    step: int

    def request(self, home: Path) -> Request:
        return Request(self.method, self.step, home / self.role / self.method.directory / f"step-{self.step}")


@dataclass(frozen=True)
class _Writer:
    """Writes models below `home`, all that are asked for at once in one pass."""

    home: Path
    resources: Resources

    def write(
        self, trajectory: Trajectory, planned: Sequence[_Planned], tell: Tell | None = None
    ) -> list[tuple[Path, Forecast]]:
        requests = [wanted.request(self.home) for wanted in planned]
        forecasts = extrapolate(
            trajectory,
            requests,
            grams=self.resources.grams,
            memory=self.resources.memory,
            threads=self.resources.threads,
            command=sys.argv,
            tell=tell,
        )
        return [(request.directory, made) for request, made in zip(requests, forecasts, strict=True)]


class _Stopwatch:
    """Passes progress on and keeps when each fit began, by its number, and whether anything was written."""

    def __init__(self, tell: Tell | None) -> None:
        self._tell = tell
        self.began: dict[int, float] = {}
        self.wrote = False

    def __call__(self, what: str, done: int, total: int) -> None:
        if what == "fitting":
            self.began.setdefault(done, time.perf_counter())
        self.wrote = self.wrote or what == "writing"
        if self._tell is not None:
            self._tell(what, done, total)


_Models = list[tuple[Row, Path | LogitsExtrapolation]]


def compare(
    run: str,
    base: str,
    plan: Plan,
    scoring: Scoring,
    resources: Resources,
    *,
    out: Path,
) -> Comparison:
    """Predict, measure and score everything planned, and what it is compared with; what was done before is kept.

    Beside the predictions are the base, the last observed checkpoint, and the real ones the store has at the targets.
    Models lie under `out`/models; compare.json, compare.md and compare.png are written to `out`. Raises RelexError and
    EvaluationError.
    """
    both, count, missing = _open(run, base, plan, resources.blocks)
    last = both.steps[count - 1]
    writer = _Writer(out / "models" / f"window-{last}", resources)
    # One Gram for all: the window's is a part of it, and every distance follows from it.
    gram = cached(
        both,
        resources.grams,
        memory=resources.memory,
        threads=resources.threads,
        on_progress=telling(resources.tell, "reading"),
    )
    inside = _parts(count) if plan.reconstruct else []
    models = _real(both, count, inside, writer)

    planned = [_Planned("predicted", method.spec, method, step) for method in plan.methods for step in plan.targets]
    planned += _reconstructions(plan.methods, [both.steps[place] for place in inside])
    watch = _Stopwatch(resources.tell)
    written = writer.write(open_trajectory(both.base, both.checkpoints[:count]), planned, watch)
    write_seconds = time.perf_counter() - max(watch.began.values()) if watch.wrote else None
    for number, (wanted, (directory, made)) in enumerate(zip(planned, written, strict=True)):
        row = Row(
            wanted.role,
            wanted.name,
            wanted.step,
            str(directory),
            distance=_distance(both, gram, made, wanted.step, resources),
            amplification=made.amplification if is_combination(made) else None,
            fit_seconds=watch.began[number + 1] - watch.began[number],
        )
        models.append((row, directory))

    model = local_model(base, resources.cache / "base")
    final = next(Path(row.model) for row, _ in models if row.role == "observed")
    for target in plan.targets if plan.logits else ():
        pair = LogitsExtrapolation(model, final, target / last)
        models.append((Row("logits", "logits-extrapolation", target, str(pair)), pair))
    models.append((Row("base", "base", 0, str(model)), model))
    models.sort(key=lambda pair: (pair[0].step, pair[0].role not in ("real", "observed")))

    rows = _score(models, scoring, resources)
    warnings = (*written[0][1].warnings, *missing)
    comparison = Comparison(run, base, both.steps[:count], tuple(rows), write_seconds, warnings)
    out.joinpath("compare.json").write_text(json.dumps(comparison.to_json(), indent=1) + "\n", encoding="utf-8")
    out.joinpath("compare.md").write_text(page(comparison, draw(comparison, out)), encoding="utf-8")
    return comparison


def _distance(both: Trajectory, gram: Gram, made: Forecast, step: int, resources: Resources) -> Distance | None:
    if step not in both.steps:
        return None
    added = along(both, made, step, memory=resources.memory, threads=resources.threads)
    return distance(gram, made, step, added=added)


def _open(run: str, base: str, plan: Plan, blocks: BlockCache | None) -> tuple[Trajectory, int, list[str]]:
    """Return the observed and the later real checkpoints, how many are observed, and what is not ready."""
    opened = open_base(base, blocks=blocks)
    stored = scan(run, opened, now=time.time(), blocks=blocks)
    seen = observed(stored, run, window=plan.window)
    last = seen[-1].step
    for target in plan.targets:
        if target <= last:
            raise TargetError(
                f"target step {target} is not beyond the window, which ends at step {last}. Give a later target or a"
                " shorter window; observed steps are rebuilt by --reconstruct."
            )
    reached = [each for each in stored if each.step in plan.targets]
    later = [Checkpoint(each.step, each.weights) for each in reached if each.weights is not None]
    missing = [f"step {each.step} is {each.state} and left out: {each.reason}" for each in reached if not each.weights]
    return open_trajectory(opened, (*seen, *later)), len(seen), missing


def _real(both: Trajectory, count: int, inside: Sequence[int], writer: _Writer) -> _Models:
    """Write the last observed checkpoint, the later ones and those numbered `inside` as predictions are stored.

    That is in the base's precision, with the base's tokenizer.
    """
    models: _Models = []
    hold = parse_method("hold")
    for place in sorted({*inside, *range(count - 1, len(both.checkpoints))}):
        step = both.steps[place]
        wanted = _Planned("real", "real run", hold, step)
        if place == count - 1:
            wanted = _Planned("observed", "last observed", hold, step)
        ((directory, _),) = writer.write(open_trajectory(both.base, both.checkpoints[: place + 1]), [wanted])
        models.append((Row(wanted.role, wanted.name, step, str(directory)), directory))
    return models


def difference(candidate: Report, reference: Report) -> tuple[float, float, float]:
    """Return the paired difference of two reports and the ends of its interval at CONFIDENCE, as the gate has them."""
    paired = gate(candidate, reference, margin=_MARGIN, confidence=CONFIDENCE)
    assert paired.interval_low is not None
    assert paired.interval_high is not None
    return paired.difference, paired.interval_low, paired.interval_high


def _parts(count: int) -> list[int]:
    # From the second checkpoint on: a trajectory has two.
    return sorted({max(1, round(part * count) - 1) for part in _PARTS})


def _reconstructions(methods: Sequence[Method], steps: Sequence[int]) -> list[_Planned]:
    """Return both sanity checks at observed steps, of every rank that RELEX is compared at (none: of rank 1)."""
    ranks = sorted({int(method.parameters.get("rank", 1)) for method in methods if method.name == "relex"}) or [1]
    checks = {"reconstruct": "reconstruct", "fit-reconstruct": "relex"}
    return [
        _Planned("reconstructed", f"{name} rank {rank}", parse_method(f"{method}:rank={rank}"), step)
        for rank in ranks
        for name, method in checks.items()
        for step in steps
    ]


@kept_children()
def _score(models: _Models, scoring: Scoring, resources: Resources) -> list[Row]:
    tell = resources.tell
    reports: list[list[Report]] = []
    for number, (_, model) in enumerate(models):
        if tell is not None:
            tell("scoring", number, len(models))
        evaluated = evaluate(
            model,
            scoring.benchmarks,
            cache=resources.cache / "evaluations",
            device=scoring.device,
            dtype=scoring.dtype,
            batch_size=scoring.batch_size,
            limit=scoring.limit,
        )
        reports.append([each.report for each in evaluated])
    if tell is not None:
        tell("scoring", len(models), len(models))
    references = next(scored for (row, _), scored in zip(models, reports, strict=True) if row.role == "observed")
    return [
        replace(row, accuracies=tuple(map(_accuracy, scored, references)))
        for (row, _), scored in zip(models, reports, strict=True)
    ]


def _accuracy(report: Report, reference: Report) -> Accuracy:
    plain = Accuracy(report.benchmark, report.n, report.accuracy, report.standard_error)
    if report.model == reference.model:
        return plain
    middle, low, high = difference(report, reference)
    return replace(plain, difference=middle, low=low, high=high)
