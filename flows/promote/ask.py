"""Asking on the Prefect page whether a registered candidate is to be the champion."""

import time
from dataclasses import dataclass
from typing import Any

from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

from deploy import champions, registry
from deploy.errors import StackError
from deploy.local.stack import Stack
from flows.approval import page_url, start
from flows.errors import PromotionError
from flows.processes import PROMOTER, spawn_promoter
from flows.promote.flow import DEPLOYMENT, promotion
from flows.promote.promotion import judge

_START_SECONDS = 60.0


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
    """Ask whether a version is to be promoted; the same question twice is one, until it is answered or has expired.

    PromotionError where the stored results already say no; StackError where nothing comes to serve the question.
    """
    candidate = champions.candidate(name, version, tracking_uri=running.mlflow_url)
    champion = registry.champion(name, tracking_uri=running.mlflow_url)
    if champion is not None and champion.digest == candidate.digest:
        raise PromotionError(f"{candidate.title} is the champion already, as {champion.title}.")
    clearance = judge(candidate, champion, tracking_uri=running.mlflow_url)
    if not clearance.passed:
        raise PromotionError(f"{candidate.title} would not be promoted. {clearance.reason}")
    spawn_promoter(running)
    against = "none" if champion is None else champion.digest
    attempt = 0
    while True:
        parameters = {"name": name, "version": candidate.version, "by": by, "question": clearance.reason}
        run = _started(running, parameters, key=f"{candidate.title} {candidate.digest} {against} {attempt}")
        if run.state is None or not run.state.is_final():
            return Asked(name, candidate.version, str(run.id), page_url(run))
        # Answered with no, failed or expired: who asks again is asked again.
        attempt += 1


def _started(running: Stack, parameters: dict[str, Any], *, key: str) -> FlowRun:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return start(f"{promotion.name}/{DEPLOYMENT}", parameters, key=key)
        except ObjectNotFound:
            if time.monotonic() > deadline:
                raise StackError(
                    f"{PROMOTER} serves no approval after {_START_SECONDS:.0f} s."
                    f" Its log is in {running.home / 'logs'}."
                ) from None
            time.sleep(0.2)
