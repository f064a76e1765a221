"""A question to a person: a flow run that waits, suspended, for the answer on its page in the Prefect UI.

It frees its process while it waits, and survives a restart of everything. One rule of expiry for all of them, which the
page says: a question is open for OPEN, and on an answer the flow that asked checks once more whether it may still be
done.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from prefect.client.schemas.objects import FlowRun
from prefect.deployments.flow_runs import run_deployment
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.utilities.urls import url_for
from pydantic import Field, create_model

OPEN = timedelta(days=30)


@dataclass(frozen=True)
class Answer:
    """What somebody chose on the page, and who says so, for the record."""

    choice: str
    by: str


def ask(question: str, choices: tuple[str, ...]) -> Answer:
    """Suspend the flow run of the caller until one of the choices is made on its page; `question` is Markdown.

    Resumed, the flow comes here again and goes on with the answer.
    """
    until = datetime.now(UTC) + OPEN
    expiry = (
        f"This question is open for {OPEN.days} days, until {until:%d %B %Y, %H:%M} UTC. On the answer it is checked"
        " again whether it may be done."
    )
    form = create_model(
        "Approval",
        __base__=RunInput,
        answer=(Literal[choices], Field(description="What is to be done.")),  # type: ignore[arg-type]
        name=(str, Field(default="", description="Who says so, for the record.")),
    )
    given: Any = suspend_flow_run(
        wait_for_input=form.with_initial_data(description=f"{question}\n\n{expiry}"),
        # The same key each time: resumed, the answer is found by it.
        key="approval",
        timeout=int(OPEN.total_seconds()),
    )
    return Answer(given.answer, f"{given.name or 'somebody'} in the Prefect UI")


def start(deployment: str, parameters: dict[str, Any], *, key: str) -> FlowRun:
    """Start the flow run that asks, or return the one that was started with this key, which may have ended.

    Raises Prefect's ObjectNotFound where no process has deployed it.
    """
    run = run_deployment(deployment, parameters=parameters, timeout=0, idempotency_key=key, as_subflow=False)
    assert isinstance(run, FlowRun)  # outside an event loop nothing is left to await
    return run


def page_url(run: FlowRun) -> str | None:
    """Return the address of the page that asks, None where Prefect knows of no UI."""
    return url_for("flow-run", obj_id=run.id)
