"""The main flow: predict, score, gate, register.

Prefect adds retries and a picture; every step is complete or absent without it.

The flow is started by `relex.window.ready`, holds the window while it works, and writes the decision last. Killed at
any moment and started again, it takes up what is there and ends in the same decision and the same single version.
"""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.utilities.urls import url_for

from deploy import registry
from evaluation.answers.harness import Progress
from evaluation.benchmarks.overlap import refuse_overlap
from evaluation.verdict.gate import Gate, gate
from evaluation.verdict.looks import spend
from evaluation.verdict.report import Report
from flows.decide import procedure
from flows.decide.gate_results import gate_results_path, write_gate_results
from flows.decide.page import draw, page, show
from flows.decide.predict import Predicted, predict, write_rungs
from flows.decide.procedure import Stages
from flows.decide.record import datasets, describe, metrics, record, tags
from flows.decide.score import reports
from flows.decide.workers import spreading
from flows.log import show_own_lines
from flows.progress import ProgressArtifact, log_result
from flows.run_names import benchmark_name, flow_run_name, task_run_name
from flows.search.ladder import Answered, answered, score
from flows.settings import Settings, load_settings
from flows.state.decision import Decision, Model, Score
from flows.state.ledger import read_ledger
from flows.state.records import write_json
from flows.state.windows import attempt, claim, decided, decision_path, read_decisions, window_directory
from flows.stop.flow import offer
from flows.stop.outlook import room
from relex.backtest.convergence import Proposal
from relex.errors import CheckpointDamagedError, DuplicateError, NonFiniteError, TargetError
from relex.files.block_cache import BlockCache
from relex.output.download import local_model
from relex.store import open_base


def count_problems(settings: Settings) -> int:
    """Return the number of selection problems; raises OverlapError when the gate has one of them too."""
    count = refuse_overlap(settings.selection, settings.gate, cache=settings.home / "evaluations").first_n
    log_result(f"{count} problems of {benchmark_name(settings.selection)}, none of them in the gate")
    return count


def predict_models(settings: Settings, steps: list[int], key: str) -> Predicted:
    """Backtest one window, and write its candidates and the last observed checkpoint."""
    progress = ProgressArtifact(f"predict-{settings.training_run}", "predict")
    with BlockCache(settings.home, size=int(settings.cache)) as blocks:
        predicted = predict(settings, steps, key, blocks=blocks, spread=spreading(settings), tell=progress)
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
                margin=settings.margin if reference.role == "observed" else 0.0,
                confidence=confidence,
                comparisons=comparisons,
                look=look,
            ),
            candidate=winner.title,
            reference=reference.title,
        )
        for reference, report in scored[1:]
    ]


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


def find_champion(settings: Settings, tracking_uri: str) -> list[Model]:
    """Return the champion of this registered model, if there is one."""
    champion = registry.champion(settings.registered_model, tracking_uri=tracking_uri)
    log_result(f"champion of {settings.registered_model}: {'none' if champion is None else champion.title}")
    if champion is None:
        return []
    weights = registry.verified(champion, tracking_uri=tracking_uri, downloads=settings.home / "champion")
    return [Model("champion", champion.target_step, str(weights), digest=champion.digest)]


def name_of_score(parameters: dict[str, Any]) -> str:
    """Return what a list calls the scoring of one model, and of another number of problems."""
    benchmarks = " and ".join(map(benchmark_name, parameters["benchmarks"]))
    first = "" if parameters["limit"] is None else f", first {parameters['limit']}"
    return f"score {parameters['model'].title} on {benchmarks}{first}"


def name_of_writing(parameters: dict[str, Any]) -> str:
    """Return what a list calls the writing of some rungs."""
    return f"write {', '.join(f'{each.method} @ {each.target_step}' for each in parameters['proposals'])}"


# Retried is what a second attempt can mend: a child killed for memory, a checkpoint that was being replaced, a server
# away.
count_task = task(name="problems", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)(count_problems)
predict_task = task(
    name="predict",
    task_run_name=task_run_name(lambda given: f"predict from step {max(given['steps'])}"),
    retries=2,
    retry_delay_seconds=5,
    cache_policy=NO_CACHE,
)(predict_models)
base_task = task(name="base", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)(fetch_base)
score_task = task(
    name="score",
    task_run_name=task_run_name(name_of_score),
    retries=2,
    retry_delay_seconds=2,
    cache_policy=NO_CACHE,
)(score_model)
write_task = task(
    name="write rungs",
    task_run_name=task_run_name(name_of_writing),
    retries=2,
    retry_delay_seconds=5,
    cache_policy=NO_CACHE,
)(write_models)
answer_task = task(
    name="climb",
    task_run_name="climb {model.title}",
    retries=2,
    retry_delay_seconds=2,
    cache_policy=NO_CACHE,
)(answer_model)
gate_task = task(
    name="gate", task_run_name="gate {winner.title}", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE
)(gate_model)
champion_task = task(name="champion", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(find_champion)
register_task = task(name="register", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(register_decision)


@flow(name="decide", flow_run_name=flow_run_name(lambda run, given: f"decide {run} at step {max(given['steps'])}"))
def decide(config: str, steps: list[int], key: str, tracking_uri: str) -> State[Any]:
    """Decide one window of the training run described in the file `config`.

    The file is read once: what is edited in it meanwhile is for the next window.
    """
    show_own_lines()
    settings = load_settings(Path(config))
    with claim(settings, key) as mine:
        if not mine:
            return Completed(message=f"window {key} is being decided by another flow run")
        if decided(settings, key):
            return Completed(message=f"window {key} is decided")
        stages = Stages(
            count_task,
            predict_task,
            write_task,
            answer_task,
            base_task,
            score_task,
            partial(champion_task, tracking_uri=tracking_uri),
            gate_task,
        )
        try:
            decision = procedure.decide(settings, steps, key, stages, attempt=_attempt(settings, steps))
        except (CheckpointDamagedError, DuplicateError, NonFiniteError, TargetError) as error:
            # Trying again would find the same: it is a decision, and "no" is an answer.
            decision = Decision(
                settings.training_run, key, max(steps), tuple(steps), "keep training", f"Cannot predict: {error}"
            )
        decision = replace(decision, page_url=url_for("flow-run", obj_id=flow_run.id) or "")
        directory = window_directory(settings, key)
        figure = draw(
            decision,
            directory / "accuracy.png",
            earlier=[past for past in read_decisions(settings) if past.window < decision.window],
            room=room(settings, decision),
        )
        directory.joinpath("decision.md").write_text(page(decision, settings), encoding="utf-8")
        decision = register_task(settings, decision, tracking_uri)
        decision = replace(decision, stop=offer(config, settings, decision, tracking_uri=tracking_uri))
        directory.joinpath("decision.md").write_text(page(decision, settings), encoding="utf-8")
        show(decision, settings, figure)
        write_json(decision_path(settings, key), decision.to_json())
        tidy(decision)
    log_result(verdict_line(decision))
    return Completed(message=f"{decision.verdict}: {decision.registered or decision.reason}")


def verdict_line(decision: Decision) -> str:
    """Return the last line of a decision's log: the verdict, and where to read on."""
    links = " ".join(filter(None, [decision.registered_url, decision.record_url, decision.page_url]))
    return f"{decision.verdict}: {decision.registered or decision.reason} {links}".rstrip()


def tidy(decision: Decision) -> None:
    """Remove the models that fell off a ladder: each manifest is in MLflow, and makes the same bytes again."""
    for fallen in decision.dropped if decision.ladder else ():
        shutil.rmtree(fallen.model.directory, ignore_errors=True)


def _attempt(settings: Settings, steps: list[int]) -> tuple[int, int]:
    """Return (n, of): this is the n-th of `of` windows that share the gate's error."""
    seen = read_ledger(settings).checkpoints
    return attempt(
        settings, open_base(settings.base), {step: seen[str(step)].identity for step in steps if str(step) in seen}
    )
