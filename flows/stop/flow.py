"""Stopping a training run on somebody's word, asked on a page of the Prefect UI.

What is approved is what was offered: the decision and the order lie in the window's directory, and another command than
the one shown is not run.
"""

import json
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Failed

from flows.approval import ask, page_url, start
from flows.errors import StopError
from flows.log import show_own_lines
from flows.run_names import flow_run_name
from flows.settings import Settings, load_settings
from flows.state.decision import Decision
from flows.state.records import write_json
from flows.state.windows import window_directory
from flows.stop.execute import Stop, decline, log_stop, message, read_stop, stop_training
from flows.stop.outlook import outlook, room, sentence, voted
from flows.stop.plan import Order, Saving, configured, order, refusal, saving
from flows.stop.status import finished, is_current, unmet

STOP = "stop the training"
CONTINUE = "keep training"


def offer(config: str, settings: Settings, decision: Decision, *, tracking_uri: str) -> str:
    """Offer to stop the training, or stop it where the settings say at once; return a few sentences for a reader.

    Nothing where the decision registered nothing. The same decision again is the same offer. At once needs a record of
    finished runs that speaks for it; without one it is asked for.
    """
    if refusal(decision):
        return ""
    said = sentence(outlook(settings, decision))
    return " ".join(filter(None, [_offer(config, settings, decision, tracking_uri=tracking_uri), said]))


def _offer(config: str, settings: Settings, decision: Decision, *, tracking_uri: str) -> str:
    costly = unmet(Path(config), settings, decision)
    if not configured(settings):
        way = f"To stop the training, add stop_command or stop_file to {config}; then `relex stop {config}`."
        return costly or " ".join(filter(None, [_worth(settings, decision), way]))
    if done := _on_record(settings, decision.key):
        return message(Path(config), done)
    counted = saving(settings, decision)
    if why_not := costly or finished(counted):
        return why_not
    due = order(Path(config), settings, decision)
    votes = voted(settings, decision)
    if settings.stop == "at-once" and "ceiling" in votes:
        try:
            done = stop_training(settings, decision, due, by="the setting stop: at-once")
        except StopError as error:
            return str(error)
        log_stop(settings, done, tracking_uri=tracking_uri)
        return message(Path(config), done)
    path = window_directory(settings, decision.key) / "offer.json"
    # The question may be on the page already: what it shows stays what is approved.
    if not path.is_file():
        write_json(path, {"decision": decision.to_json(), "order": due.to_json()})
    by_hand = f"`relex stop {config} --confirm` does it"
    try:
        run = start(
            f"{stop_flow.name}/{settings.training_run}",
            {"config": config, "key": decision.key},
            key=f"{settings.home} {decision.key}",
        )
    except ObjectNotFound:
        return f"Nothing serves the approval of stopping the training: {by_hand}."
    if run.state is not None and run.state.is_final():
        return f"Stopping the training was offered and not done: {run.state.message} {by_hand}."
    asked = ""
    if settings.stop == "at-once":
        asked = " It is asked for although stop is at-once: the record of finished runs does not speak for it yet."
    offered = f"Stopping the training is offered: approve it at {page_url(run)}, or {by_hand}.{asked}"
    return f"{offered} {_worth(settings, decision)} {counted.sentence}"


@flow(
    name="stop-training",
    flow_run_name=flow_run_name(lambda run, given: f"stop {run}, window {given['key']}"),
    retries=0,
)
def stop_flow(config: str, key: str, tracking_uri: str) -> State[Any]:
    """Ask whether the training run described in the file `config` is to be stopped, wait, and do as is answered."""
    show_own_lines()
    settings = load_settings(Path(config))
    content = json.loads((window_directory(settings, key) / "offer.json").read_bytes())
    decision = Decision.from_json(content["decision"])
    if done := _on_record(settings, key):
        return Completed(message=message(Path(config), done))
    due = order(Path(config), settings, decision)
    answer = ask(
        question(decision, due, saving(settings, decision), worth=_worth(settings, decision)), (STOP, CONTINUE)
    )
    if answer.choice == CONTINUE:
        declined = decline(settings, key, by=answer.by)
        log_stop(settings, declined, tracking_uri=tracking_uri)
        return Completed(message=message(Path(config), declined))
    if not is_current(settings, decision):
        return Failed(
            message=f"What was approved was decided on other checkpoints or settings than there are now:"
            f" nothing was done. `relex stop {config}` tells how it stands."
        )
    if due.to_json() != content["order"]:
        return Failed(
            message=f"What was approved is not what {config} says now, which is: {due.actions}. Nothing was done;"
            f" `relex stop {config} --confirm` does it."
        )
    if nothing_left := finished(saving(settings, decision)):
        return Failed(message=f"What was approved is not due any more. {nothing_left}")
    try:
        done = stop_training(settings, decision, due, by=answer.by)
    except StopError as error:
        return Failed(message=str(error))
    log_stop(settings, done, tracking_uri=tracking_uri)
    return (Completed if done.state == "stopped" else Failed)(message=message(Path(config), done))


def question(decision: Decision, due: Order, counted: Saving, *, worth: str = "") -> str:
    """Return, as Markdown, what the form is about; `worth` says what training on may win."""
    return "\n\n".join(
        [
            f"**Stop {decision.training_run}?** {decision.reason}",
            f"Registered: {decision.registered or due.model} (step {due.target_step}). {worth}",
            counted.sentence,
            f"On *{STOP}*, once: {due.actions}.",
        ]
    )


def _worth(settings: Settings, decision: Decision) -> str:
    """Return what training on may win at most, and which rules a record speaks for."""
    left = room(settings, decision)
    votes = voted(settings, decision)
    parts = [] if left is None else [f"{left.sentence}."]
    if votes:
        parts.append(f"The record of finished runs speaks for a stop by: {', '.join(votes)}.")
    return " ".join(parts)


def _on_record(settings: Settings, key: str) -> Stop | None:
    """Return what was done or begun, or declined on this decision; on another one it may be offered again."""
    record = read_stop(settings)
    return None if record is None or (record.state == "declined" and record.decision != key) else record
