"""Champions: the version of `<name>` that carries the alias, how a candidate becomes it and how the former one returns.

Under one lock: what a killed process left is cleared, the champion is read again, the weights are verified, the caller
judges, the audit run is opened, the version is copied, and the alias moves last. It is never taken away, so `<name>`
is never without a champion once it has one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from deploy import audit
from deploy.audit import Entry
from deploy.errors import CandidateError, NoSuchVersionError
from deploy.reaper import reap
from deploy.registry import verified
from deploy.tracking import connect, locked_experiment, refusals
from deploy.versions import (
    AUDIT,
    CANDIDATES,
    CHAMPION,
    RegisteredModelVersion,
    champion_version,
    ensure_registered_model,
    known_version,
    row,
    unknown,
    versions,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient


@dataclass(frozen=True)
class Clearance:
    """Whether a candidate may become the champion, why in one line, and the numbers that say so."""

    passed: bool
    reason: str
    metrics: Mapping[str, float]


# Clears a candidate, or refuses to, against the champion there is, if any.
Judge: TypeAlias = Callable[[RegisteredModelVersion, RegisteredModelVersion | None], Clearance]


def promote(name: str, version: int | None, *, tracking_uri: str, by: str, judge: Judge, downloads: Path) -> Entry:
    """Make version `version` of `<name>-candidates` (None: the newest) the champion if it is whole and `judge` agrees.

    Returns the entry of the audit trail; its verdict is "promoted" or "refused". Of the champion itself it is the entry
    that made it one, and nothing is done. NoSuchVersionError where there is no such candidate, or where the newest was
    rolled back and was not named. Remote weights are read through `downloads`.
    """
    client = connect(tracking_uri)
    _refuse_unknown(client, name)
    with locked_experiment(client, name) as experiment:
        reap(client, name, experiment)
        candidate = find_candidate(client, name, version)
        trail = audit.read(client, experiment)
        champion = _champion(client, name)
        is_champion = champion is not None and champion.digest == candidate.digest
        if is_champion:
            made = [entry for entry in trail if entry.moved and entry.digest == candidate.digest]
            if made:
                return made[-1]
        if version is None and (undone := audit.rolled_back(trail, candidate.digest)):
            raise NoSuchVersionError(
                f"{candidate.title}, the newest, was champion and {undone.by} rolled it back. To promote it again, name"
                f" it: {candidate.version}."
            )
        try:
            verified(candidate, tracking_uri=tracking_uri, downloads=downloads)
            clearance = judge(candidate, None if is_champion else champion)
        except CandidateError as error:
            clearance = Clearance(passed=False, reason=str(error), metrics={})
        entry = audit.begin(
            client,
            experiment,
            "promote",
            number=_next(trail),
            title=f"promote {candidate.title}",
            reason=clearance.reason,
            by=by,
            digest=candidate.digest,
            candidate=candidate.version,
            from_version=None if champion is None else champion.version,
            metrics=clearance.metrics,
        )
        if not clearance.passed:
            return audit.close(client, entry, "refused")
        copied = _copy(client, name, candidate, number=entry.number)
        entry = audit.aim(client, entry, copied)
        client.set_registered_model_alias(name, CHAMPION, str(copied))
        return audit.close(client, entry, "promoted")


def rollback(name: str, *, tracking_uri: str, by: str, downloads: Path) -> Entry:
    """Give the alias back to the champion before, once it is found to be whole, and return the audit entry.

    NoSuchVersionError where there is none; CandidateError where it is damaged, and the champion stays.
    """
    client = connect(tracking_uri)
    _refuse_unknown(client, name)
    with locked_experiment(client, name) as experiment:
        reap(client, name, experiment)
        champion = _champion(client, name)
        if champion is None:
            raise NoSuchVersionError(f"{name} has no champion to go back from. Promote one: relex promote {name}.")
        trail = audit.read(client, experiment)
        former = audit.before(trail, champion.version)
        kept = [] if former is None else list(versions(client, f"name = '{name}' and version_number = {former}"))
        if not kept:
            deleted = "" if former is None else f" (version {former} was deleted)"
            raise NoSuchVersionError(
                f"{champion.title} has no champion before it{deleted}. Promote another candidate: relex models {name}."
            )
        target = row(client, kept[0], champion=False)
        verified(target, tracking_uri=tracking_uri, downloads=downloads)
        entry = audit.begin(
            client,
            experiment,
            "rollback",
            number=_next(trail),
            title=f"roll {name} back to version {target.version}",
            reason=f"{target.title} was champion before {champion.title}.",
            by=by,
            digest=target.digest,
            candidate=None,
            from_version=champion.version,
            metrics={},
        )
        entry = audit.aim(client, entry, target.version)
        client.set_registered_model_alias(name, CHAMPION, str(target.version))
        return audit.close(client, entry, "rolled back")


def history(name: str, *, tracking_uri: str) -> list[Entry]:
    """Return the audit trail of `name`, oldest first; empty where nothing was ever promoted."""
    client = connect(tracking_uri)
    with refusals(client):
        experiment = client.get_experiment_by_name(name)
        return [] if experiment is None else audit.read(client, experiment)


def candidate(name: str, version: int | None, *, tracking_uri: str) -> RegisteredModelVersion:
    """Return a registered prediction, the newest for None; NoSuchVersionError where there is none."""
    client = connect(tracking_uri)
    with refusals(client):
        return find_candidate(client, name, version)


def find_candidate(client: "MlflowClient", name: str, version: int | None) -> RegisteredModelVersion:
    """Return a registered prediction, the newest for None; NoSuchVersionError where there is none."""
    candidates = {int(each.version): each for each in versions(client, f"name = '{name}{CANDIDATES}'")}
    wanted = version if version is not None else max(candidates, default=None)
    if wanted is None or wanted not in candidates:
        known = ", ".join(map(str, sorted(candidates)))
        raise NoSuchVersionError(
            f"{name}{CANDIDATES} has no version {wanted}: its versions are {known}. See relex models {name}."
            if candidates
            else unknown(client, name) or f"{name}{CANDIDATES} has no version. See relex models."
        )
    return row(client, candidates[wanted], champion=False)


def _refuse_unknown(client: "MlflowClient", name: str) -> None:
    """Raise NoSuchVersionError for a name without candidates; before a lock is taken, which makes what it locks."""
    with refusals(client):
        if line := unknown(client, name):
            raise NoSuchVersionError(line)


def _champion(client: "MlflowClient", name: str) -> RegisteredModelVersion | None:
    version = champion_version(client, name)
    return None if version is None else row(client, version, champion=True)


def _next(trail: list[Entry]) -> int:
    return trail[-1].number + 1 if trail else 1


def _copy(client: "MlflowClient", name: str, candidate: RegisteredModelVersion, *, number: int) -> int:
    known = known_version(client, name, candidate.digest)
    if known is not None:
        return int(known.version)
    ensure_registered_model(
        client, name, f"What was promoted of `{candidate.name}`; `{CHAMPION}` is the one that is served."
    )
    version = client.get_model_version(candidate.name, str(candidate.version))
    # What MlflowClient.copy_model_version does, with the number of the entry from the first moment on.
    copied = client.create_model_version(
        name,
        source=f"models:/{candidate.name}/{candidate.version}",
        run_id=candidate.run_id,
        model_id=version.model_id,
        description=version.description,
        tags={**version.tags, AUDIT: str(number)},
    )
    return int(copied.version)
