"""The stages of a decision: each does one thing, shows how far it is in the Prefect UI, and logs what it found."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from deploy import registry
from evaluation.answers.divergence import divergence
from evaluation.answers.harness import Progress
from evaluation.benchmarks.overlap import refuse_overlap
from evaluation.verdict.gate import Gate, gate
from evaluation.verdict.looks import spend
from evaluation.verdict.report import Report
from flows.decide.gate_results import gate_results_path, write_gate_results
from flows.decide.predict import Predicted, predict, write_rungs
from flows.decide.record import datasets, describe, metrics, record, tags
from flows.decide.score import reports
from flows.decide.workers import sharing, spreading
from flows.progress import ProgressArtifact, log_result
from flows.run_names import benchmark_name
from flows.search.ladder import Answered, answered, score
from flows.settings import Settings
from flows.state.decision import Decision, Divergence, Model, Score
from flows.state.scored import best_for
from flows.state.snapshot import look_at
from relex.backtest.convergence import Proposal
from relex.files.block_cache import BlockCache
from relex.output.download import local_model


def count_problems(settings: Settings) -> int:
    """Return the number of selection problems; raises OverlapError when the gate or a guard has one of them too."""
    cache = settings.home / "evaluations"
    count = refuse_overlap(settings.selection, settings.gate, cache=cache).first_n
    for guard in settings.guards:
        refuse_overlap(settings.selection, guard, judge="guard", cache=cache)
    log_result(f"{count} problems of {benchmark_name(settings.selection)}, none of them in the gate")
    return count


def predict_models(settings: Settings, steps: list[int], key: str) -> Predicted:
    """Backtest one window, and write its candidates and the last observed checkpoint."""
    progress = ProgressArtifact(f"predict-{settings.training_run}", "predict")
    with BlockCache(settings.home, size=int(settings.cache)) as blocks:
        predicted = predict(
            settings, steps, key, blocks=blocks, spread=spreading(settings), share=sharing(settings), tell=progress
        )
    log_result(f"backtest: {predicted.backtested.state}: {predicted.backtested.reason}")
    log_result(f"predicted {_titles(predicted.candidates) or 'nothing yet'}")
    return predicted


def write_models(settings: Settings, steps: list[int], key: str, proposals: list[Proposal]) -> list[Model]:
    """Write some rungs of the window's ladder."""
    progress = ProgressArtifact(f"predict-{settings.training_run}", "predict")
    with BlockCache(settings.home, size=int(settings.cache)) as blocks:
        spread = spreading(settings)
        models = list(write_rungs(settings, steps, key, proposals, blocks=blocks, spread=spread, tell=progress))
    log_result(f"predicted {_titles(models)}")
    return models


def _titles(models: Sequence[Model]) -> str:
    return ", ".join(model.title for model in models)


def fetch_base(settings: Settings) -> Model:
    """Return the base as a directory of this machine; one in a store is copied once."""
    base = Model("base", 0, str(local_model(settings.base, settings.home / "base")))
    log_result(f"base: {base.directory}")
    return base


def score_model(settings: Settings, model: Model, benchmarks: list[str], limit: int | None) -> list[Score]:
    """Score one model on the benchmarks, or their first problems; answers already given are not asked for again."""
    return [score(model, report) for report in _reports(settings, model, benchmarks, limit)]


def answer_model(settings: Settings, model: Model, limit: int | None) -> Answered:
    """Score one model on the first selection problems, one by one."""
    (report,) = _reports(settings, model, [settings.selection], limit)
    return answered(model, report)


def _reports(settings: Settings, model: Model, benchmarks: list[str], limit: int | None) -> list[Report]:
    progress = ProgressArtifact(f"score-{settings.training_run}", f"score {model.title}")

    def tell(step: Progress) -> None:
        progress(f"{step.benchmark} {step.done}/{step.total}", step.done, step.total)

    scored = reports(settings, model, benchmarks, limit=limit, on_progress=tell)
    for report in scored:
        log_result(f"score {model.title} on {benchmark_name(report.benchmark)}: {report.sentence}")
    return scored


def gate_model(settings: Settings, winner: Model, references: list[Model], comparisons: int) -> list[Gate]:
    """Compare the chosen candidate with each reference on the gate benchmark, problem by problem.

    `comparisons` windows of the run share the error with what looks there were at this gate before.
    """
    scored = [(model, reports(settings, model, [settings.gate])[0]) for model in (winner, *references)]
    gates = gate_scored(settings, scored, comparisons)
    for each in gates:
        log_result(f"gate: {each.sentence}")
    return gates


def gate_scored(settings: Settings, scored: list[tuple[Model, Report]], comparisons: int) -> list[Gate]:
    """Compare the first of the scored models with each of the others, and keep what was compared.

    It is one look of this training run at the gate, however often it is done.
    """
    winner, ours = scored[0]
    confidence = settings.confidence
    look = spend(
        settings.home / "looks.json",
        [report for _, report in scored],
        confidence=confidence,
        planned=comparisons,
    )
    # A promotion judges again by them, without a model.
    write_gate_results(
        gate_results_path(settings, winner),
        scored[0],
        scored[1:],
        margin=settings.margin,
        confidence=confidence,
        comparisons=comparisons,
        look=look,
    )
    return [
        replace(
            gate(
                ours,
                report,
                # Non-inferior to what was observed, but better than what people already use.
                margin=settings.margin if reference.role in ("observed", "best") else 0.0,
                confidence=confidence,
                comparisons=comparisons,
                look=look,
            ),
            candidate=winner.title,
            reference=reference.title,
        )
        for reference, report in scored[1:]
    ]


def guard_model(settings: Settings, winner: Model, observed: Model, comparisons: int) -> list[Gate]:
    """Compare the chosen candidate with the last observed checkpoint on every guard, each with its own margin.

    Each is loaded once for all of them.
    """
    ours, theirs = (reports(settings, model, [*settings.guards]) for model in (winner, observed))
    guards = guard_scored(settings, (winner, ours), (observed, theirs), comparisons)
    for each in guards:
        log_result(f"guard: {each.sentence}")
    return guards


def guard_scored(
    settings: Settings,
    winner: tuple[Model, Sequence[Report]],
    observed: tuple[Model, Sequence[Report]],
    comparisons: int,
) -> list[Gate]:
    """Compare two models by their reports on the guards.

    The guards share the error 1 - confidence equally: that one of them is wrongly said to hold comes no more often. At
    each guard every look of the run is counted, as at the gate.
    """
    confidence = 1 - (1 - settings.confidence) / len(settings.guards)
    guards = []
    for margin, ours, theirs in zip(settings.guards.values(), winner[1], observed[1], strict=True):
        look = spend(settings.home / "looks.json", [ours, theirs], confidence=confidence, planned=comparisons)
        compared = gate(ours, theirs, margin=margin / 100, confidence=confidence, comparisons=comparisons, look=look)
        guards.append(replace(compared, candidate=winner[0].title, reference=observed[0].title))
    return guards


def diverge_models(settings: Settings, winner: Model, observed: Model, base: Model) -> Divergence:
    """Measure how far the chosen candidate and the last observed checkpoint are from the base on the gate's prompts."""
    measured = divergence(
        [Path(winner.directory), Path(observed.directory)],
        Path(base.directory),
        settings.gate,
        cache=settings.home / "evaluations",
        device=settings.device,
        dtype=settings.dtype,
        evaluations=settings.evaluations,
    )
    result = Divergence(measured.benchmark, measured.prompts, measured.tokens, *measured.nats)
    log_result(f"divergence: {result.sentence}")
    return result


def register_decision(settings: Settings, decision: Decision, tracking_uri: str) -> Decision:
    """Record the decision in MLflow and, if the gate was passed, register the winner; return it with the addresses."""
    recorded = record(settings, decision, tracking_uri=tracking_uri)
    decision = replace(decision, record_url=recorded.url or "")
    if decision.verdict != "registered" or decision.winner is None:
        return decision
    done = registry.register(
        Path(decision.winner.directory),
        name=settings.registered_model,
        tracking_uri=tracking_uri,
        run_id=recorded.run_id,
        metrics=metrics(decision),
        datasets=datasets(settings),
        tags=tags(decision),
        description=describe(settings, decision),
        gate_reports=[gate_results_path(settings, decision.winner)],
    )
    log_result(f"{'registered' if done.created else 'was registered already'}: {done.name} version {done.version}")
    return replace(decision, registered=f"{done.name} version {done.version}", registered_url=done.url or "")


def find_best(settings: Settings, key: str) -> list[Model]:
    """Return the best observed checkpoint, if checkpoints are scored and there is one."""
    if settings.score_every is None:
        return []
    chosen = best_for(settings, key, look_at(settings, settings.checkpoints).ever)
    log_result(f"best observed checkpoint: {'none is scored' if chosen is None else chosen.title}")
    return [] if chosen is None else [chosen]


def find_champion(settings: Settings, tracking_uri: str) -> list[Model]:
    """Return the champion of this registered model, if there is one."""
    champion = registry.champion(settings.registered_model, tracking_uri=tracking_uri)
    log_result(f"champion of {settings.registered_model}: {'none' if champion is None else champion.title}")
    if champion is None:
        return []
    weights = registry.verified(champion, tracking_uri=tracking_uri, downloads=settings.home / "champion")
    return [Model("champion", champion.target_step, str(weights), digest=champion.digest)]
