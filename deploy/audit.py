"""The audit trail of a registered model: one MLflow run for every promotion and rollback, refused ones too.

What was set on MLflow's own pages has its entries like what was asked of a command.

Entries are numbered under the lock, so their order does not hang on clocks. An entry is RUNNING while its alias may or
may not have moved; deploy.reaper settles one whose process died.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from deploy.runs import KEY_TAG, log_metrics
from deploy.tracking import page_url
from deploy.versions import AUDIT

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

Action = Literal["promote", "rollback"]
# "stands": what was set in MLflow is the champion already.
Verdict = Literal["promoted", "rolled back", "refused", "stands", "abandoned", "under way"]
_TO_VERSION = "to_version"
_ASKED, _INSIST = "asked", "insist"
DONE: Mapping[str, Verdict] = {"promote": "promoted", "rollback": "rolled back"}


@dataclass(frozen=True)
class Entry:
    """Who moved the alias champion when, from which version of the model to which, by which numbers.

    `candidate` is the version among the candidates a promotion was asked for; versions are None where there was none.
    `asked` is the version on which it was set in MLflow, as MODEL/VERSION, empty for what a command asked; `insist` is
    why it was to be champion all the same. Not `finished`: somebody is at it, or died.
    """

    number: int
    action: Action
    verdict: Verdict
    reason: str
    by: str
    digest: str
    candidate: int | None
    from_version: int | None
    to_version: int | None
    metrics: Mapping[str, float]
    at_ms: int
    run_id: str
    url: str | None
    asked: str = ""
    insist: str = ""
    finished: bool = True

    @property
    def moved(self) -> bool:
        """Whether the alias was moved."""
        return self.verdict in DONE.values()


def begin(
    client: "MlflowClient",
    experiment: "Experiment",
    action: Action,
    *,
    number: int,
    title: str,
    reason: str,
    by: str,
    digest: str,
    candidate: int | None,
    from_version: int | None,
    metrics: Mapping[str, float],
    asked: str = "",
    insist: str = "",
) -> Entry:
    """Open the entry `number` of the trail, one more than the last."""
    tags = {
        AUDIT: str(number),
        "action": action,
        "verdict": "under way",
        "reason": reason,
        "by": by,
        "digest": digest,
        "candidate": _text(candidate),
        "from_version": _text(from_version),
        **({_ASKED: asked} if asked else {}),
        **({_INSIST: insist} if insist else {}),
    }
    tags[KEY_TAG] = f"audit {number:08d}"
    run = client.create_run(experiment.experiment_id, run_name=title, tags=tags)
    log_metrics(client, run, metrics)
    return replace(entry_of(client, run), metrics=metrics)


def aim(client: "MlflowClient", entry: Entry, to_version: int) -> Entry:
    """Note where the alias is about to go."""
    client.set_tag(entry.run_id, _TO_VERSION, str(to_version))
    return replace(entry, to_version=to_version)


def decide(client: "MlflowClient", entry: Entry, verdict: Verdict) -> Entry:
    """Note the verdict of an entry that goes on: it is still to be written where it was asked for."""
    client.set_tag(entry.run_id, "verdict", verdict)
    return replace(entry, verdict=verdict)


def close(client: "MlflowClient", entry: Entry, verdict: Verdict) -> Entry:
    """End an entry and return it."""
    client.set_tag(entry.run_id, "verdict", verdict)
    client.set_terminated(entry.run_id, "KILLED" if verdict == "abandoned" else "FINISHED")
    return replace(entry, verdict=verdict, finished=True)


def read(client: "MlflowClient", experiment: "Experiment") -> list[Entry]:
    """Return the whole trail, oldest first."""
    entries, token = [], None
    while True:
        runs = client.search_runs(
            [experiment.experiment_id], filter_string=f"tags.`{KEY_TAG}` LIKE 'audit %'", page_token=token
        )
        entries += [entry_of(client, run) for run in runs]
        token = runs.token
        if not token:
            return sorted(entries, key=lambda entry: entry.number)


def rolled_back(entries: Sequence[Entry], digest: str) -> Entry | None:
    """Return the rollback that took a prediction's alias away and that no promotion followed, or None."""
    last = None
    copies = {entry.to_version for entry in entries if entry.moved and entry.digest == digest}
    for entry in filter(lambda entry: entry.moved, entries):
        if entry.digest == digest:
            last = None
        elif entry.action == "rollback" and entry.from_version in copies:
            last = entry
    return last


def stack(entries: Sequence[Entry]) -> list[int]:
    """Return the champion's version and, below it, those that were champion before it and not rolled back.

    A promotion puts a version on top, a rollback takes one away; what the next entry found there, moved by hand and
    judged by nobody, counts as put there.
    """
    versions: list[int] = []
    for entry in filter(lambda entry: entry.moved, entries):
        if entry.from_version is not None and versions[-1:] != [entry.from_version]:
            versions.append(entry.from_version)
        if entry.action == "promote":
            if versions[-1:] != [entry.to_version]:
                versions.append(cast("int", entry.to_version))
        else:
            while versions[-1] != entry.to_version:
                versions.pop()
    return versions


def before(entries: Sequence[Entry], champion: int) -> int | None:
    """Return the version that was champion before version `champion` became it, or None."""
    versions = stack(entries)
    if versions[-1:] != [champion]:
        versions.append(champion)
    return versions[-2] if len(versions) > 1 else None


def entry_of(client: "MlflowClient", run: "Run") -> Entry:
    """Return the entry that a run holds."""
    tags = run.data.tags
    return Entry(
        number=int(tags[AUDIT]),
        action=cast("Action", tags["action"]),
        verdict=cast("Verdict", tags["verdict"]),
        reason=tags["reason"],
        by=tags["by"],
        digest=tags["digest"],
        candidate=_number(tags["candidate"]),
        from_version=_number(tags["from_version"]),
        to_version=_number(tags.get(_TO_VERSION, "")),
        metrics=dict(run.data.metrics),
        at_ms=run.info.start_time,
        run_id=run.info.run_id,
        url=page_url(client.tracking_uri, f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}"),
        asked=tags.get(_ASKED, ""),
        insist=tags.get(_INSIST, ""),
        finished=run.info.status != "RUNNING",
    )


def _text(number: int | None) -> str:
    return "" if number is None else str(number)


def _number(text: str) -> int | None:
    return int(text) if text else None
