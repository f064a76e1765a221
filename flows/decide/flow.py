"""The main flow: predict, score, gate, guard, register.

Prefect adds retries and a picture; every step is complete or absent without it.

The flow is started by `relex.window.ready`, holds the window while it works, and writes the decision last. Killed at
any moment and started again, it takes up what is there and ends in the same decision and the same single version.
"""

import shutil
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

from flows.decide import procedure
from flows.decide.page import draw, page, show
from flows.decide.procedure import Stages
from flows.decide.stages import (
    answer_model,
    count_problems,
    diverge_models,
    fetch_base,
    find_best,
    find_champion,
    gate_model,
    guard_model,
    predict_models,
    register_decision,
    score_model,
    write_models,
)
from flows.log import show_own_lines
from flows.progress import log_result
from flows.run_names import benchmark_name, flow_run_name, task_run_name
from flows.settings import Settings, load_settings
from flows.state.decision import Decision
from flows.state.failure import keep_failure
from flows.state.ledger import read_ledger
from flows.state.records import write_json
from flows.state.windows import attempt, claim, decided, decision_path, read_decisions, window_directory
from flows.stop.flow import offer
from flows.stop.outlook import room
from relex.errors import CheckpointDamagedError, DuplicateError, NonFiniteError, TargetError
from relex.store import open_base


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
guard_task = task(
    name="guards", task_run_name="guards of {winner.title}", retries=2, retry_delay_seconds=2, cache_policy=NO_CACHE
)(guard_model)
diverge_task = task(
    name="divergence",
    task_run_name="divergence of {winner.title}",
    retries=2,
    retry_delay_seconds=2,
    cache_policy=NO_CACHE,
)(diverge_models)
best_task = task(name="best observed", retries=2, retry_delay_seconds=5, cache_policy=NO_CACHE)(find_best)
champion_task = task(name="champion", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(find_champion)
register_task = task(name="register", retries=3, retry_delay_seconds=5, cache_policy=NO_CACHE)(register_decision)


@flow(
    name="decide",
    flow_run_name=flow_run_name(lambda run, given: f"decide {run} at step {max(given['steps'])}"),
    on_failure=[keep_failure],
)
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
            guard_task,
            diverge_task,
            best_task,
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
