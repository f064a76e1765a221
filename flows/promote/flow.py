"""Promotion on somebody's word: a flow run that waits, suspended, for the answer in the Prefect UI.

It frees its process while it waits and survives a restart of everything: flows.promote.promoter takes the resumed run
up. The approved version is promoted only if it still passes, at that moment, against the champion there is.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments.flow_runs import run_deployment
from prefect.deployments.runner import RunnerDeployment
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, Failed
from prefect.types.entrypoint import EntrypointType
from prefect.utilities.urls import url_for
from pydantic import Field

from deploy import champions, registry
from deploy.errors import DeployError, StackError
from deploy.local.stack import Stack
from flows.errors import PromotionError
from flows.processes import PROMOTER, spawn_promoter
from flows.promote.promotion import judge, promote

_DEPLOYMENT = "stack"
_ANSWER_SECONDS = 30 * 24 * 3600
_START_SECONDS = 60.0


class Approval(RunInput):
    """The form."""

    answer: Literal["promote", "do not promote"] = Field(description="What is to be done.")
    name: str = Field(default="", description="Who says so, for the record.")


@dataclass(frozen=True)
class Asked:
    """A question in the Prefect UI: the version it is about, and the page with the form."""

    name: str
    version: int
    flow_run_id: str
    url: str | None

    @property
    def sentence(self) -> str:
        """Return what happens next."""
        return f"{self.name}-candidates version {self.version} waits for an answer at {self.url}"


def ask(running: Stack, name: str, version: int | None, *, by: str) -> Asked:
    """Ask in the Prefect UI whether a version is to be promoted; the same question twice is one.

    PromotionError where the stored results already say no; StackError where nothing comes to serve the question.
    """
    candidate = champions.candidate(name, version, tracking_uri=running.mlflow_url)
    champion = registry.champion(name, tracking_uri=running.mlflow_url)
    if champion is not None and champion.digest == candidate.digest:
        raise PromotionError(f"{candidate.title} is the champion already, as {champion.title}.")
    judgement = judge(candidate, champion, tracking_uri=running.mlflow_url)
    if not judgement.passed:
        raise PromotionError(f"{candidate.title} would not be promoted. {judgement.reason}")
    spawn_promoter(running)
    against = "none" if champion is None else champion.digest
    attempt = 0
    while True:
        parameters = {"name": name, "version": candidate.version, "by": by, "question": judgement.reason}
        run = _run(running, parameters, key=f"{candidate.title} {candidate.digest} {against} {attempt}")
        if run.state is None or not run.state.is_final():
            return Asked(name, candidate.version, str(run.id), url_for("flow-run", obj_id=run.id))
        # Answered with no, or failed: who asks again is asked again.
        attempt += 1


def _run(running: Stack, parameters: dict[str, Any], *, key: str) -> FlowRun:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            run = run_deployment(
                f"{promotion.name}/{_DEPLOYMENT}",
                parameters=parameters,
                timeout=0,
                idempotency_key=key,
                as_subflow=False,
            )
        except ObjectNotFound:
            if time.monotonic() > deadline:
                raise StackError(
                    f"{PROMOTER} serves no approval after {_START_SECONDS:.0f} s."
                    f" Its log is in {running.home / 'logs'}."
                ) from None
            time.sleep(0.2)
            continue
        assert isinstance(run, FlowRun)  # outside an event loop nothing is left to await
        return run


@flow(name="promote", flow_run_name="promote {name} {version}", retries=0)
def promotion(name: str, version: int, *, by: str, question: str, tracking_uri: str, downloads: str) -> State[Any]:
    """Ask whether version `version` of `<name>-candidates` is to be champion, wait, and do as is answered."""
    description = f"**Make {name}-candidates version {version} the champion?** {by} asks. {question}"
    # The same key: resumed, the flow comes here again and finds the answer.
    answer = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(description=description), key="approval", timeout=_ANSWER_SECONDS
    )
    who = f"{answer.name or 'somebody'} in the Prefect UI"
    if answer.answer != "promote":
        return Completed(message=f"Not promoted, says {who}.")
    try:
        done = promote(name, version, tracking_uri=tracking_uri, by=f"{who}, asked by {by}", downloads=Path(downloads))
    except (PromotionError, DeployError) as error:
        return Failed(message=str(error))
    return Completed(message=done.sentence)


def approval_deployment(tracking_uri: str, downloads: Path) -> RunnerDeployment:
    """Return the deployment that asks; `ask` starts its runs."""
    deployment = promotion.to_deployment(
        name=_DEPLOYMENT,
        description="Asks whether a registered prediction is to be the champion, and does as is answered.",
        parameters={"tracking_uri": tracking_uri, "downloads": str(downloads)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment)  # outside an event loop nothing is left to await
    return deployment
