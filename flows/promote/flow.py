"""Promotion on somebody's word: asked on a page of the Prefect UI, and done if it still passes when it is answered."""

from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.deployments.runner import RunnerDeployment
from prefect.states import Completed, Failed
from prefect.types.entrypoint import EntrypointType

from deploy.errors import DeployError
from flows.approval import ask
from flows.errors import PromotionError
from flows.promote.promotion import promote

DEPLOYMENT = "stack"
PROMOTE = "promote"
LEAVE = "do not promote"


@flow(name="promote", flow_run_name="promote {name} {version}", retries=0)
def promotion(name: str, version: int, *, by: str, question: str, tracking_uri: str, downloads: str) -> State[Any]:
    """Ask whether version `version` of `<name>-candidates` is to be champion, wait, and do as is answered.

    It is judged again on the answer, against the champion there is then.
    """
    answer = ask(f"**Make {name}-candidates version {version} the champion?** {by} asks. {question}", (PROMOTE, LEAVE))
    if answer.choice != PROMOTE:
        return Completed(message=f"Not promoted, says {answer.by}.")
    by = f"{answer.by}, asked by {by}"
    try:
        promoted = promote(name, version, tracking_uri=tracking_uri, by=by, downloads=Path(downloads))
    except (PromotionError, DeployError) as error:
        return Failed(message=str(error))
    return Completed(message=promoted.sentence)


def approval_deployment(tracking_uri: str, downloads: Path) -> RunnerDeployment:
    """Return the deployment that asks; flows.promote.ask starts its runs."""
    deployment = promotion.to_deployment(
        name=DEPLOYMENT,
        description="Asks whether a registered prediction is to be the champion, and does as is answered.",
        parameters={"tracking_uri": tracking_uri, "downloads": str(downloads)},
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    assert isinstance(deployment, RunnerDeployment)  # outside an event loop nothing is left to await
    return deployment
