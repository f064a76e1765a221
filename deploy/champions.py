"""Champions: the version of `<name>` that carries the alias, how a candidate becomes it and how the former one returns.

Under one lock: what a killed process left is cleared, what people set on MLflow's own pages is judged, the champion is
read again, the weights are verified, the caller judges, the audit run is opened, the version is copied, and the alias
moves last. It is never taken away, so `<name>` is never without a champion once it has one. What was set by hand and is
refused gives the alias back to the champion before: whoever loads `<name>@champion` gets what was judged.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from deploy import audit, wishes
from deploy.audit import Entry
from deploy.errors import CandidateError, NoSuchVersionError
from deploy.reaper import reap
from deploy.registry import verified
from deploy.tracking import connect, locked_experiment, refusals
from deploy.versions import (
    AUDIT,
    CANDIDATES,
    CHAMPION,
    DIGEST,
    FILES,
    MODEL_ID,
    STEP,
    RegisteredModelVersion,
    ensure_registered_model,
    known_version,
    row,
    unknown,
    versions,
)
from deploy.wishes import ANSWER, INSIST, Wish

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities.model_registry import ModelVersion

_BY_HAND = "set in MLflow"
# Who holds it longer registers a large model; what was set in MLflow is judged the next time.
_SETTLE_SECONDS = 60


@dataclass(frozen=True)
class Clearance:
    """Whether a candidate may become the champion, why in one line, and the numbers that say so."""

    passed: bool
    reason: str
    metrics: Mapping[str, float]


# Clears a candidate, or refuses to, against the champion there is, if any.
Judge: TypeAlias = Callable[[RegisteredModelVersion, RegisteredModelVersion | None], Clearance]


def promote(
    name: str,
    version: int | None,
    *,
    tracking_uri: str,
    by: str,
    judge: Judge,
    downloads: Path,
    insist: str = "",
) -> Entry:
    """Make version `version` of `<name>-candidates` (None: the newest) the champion if it is whole and `judge` agrees.

    Returns the entry of the audit trail; its verdict is "promoted" or "refused". Of the champion itself it is the entry
    that made it one, and nothing is done. With `insist`, a reason, a whole candidate is promoted whatever `judge` says,
    and both are on record. NoSuchVersionError where there is no such candidate, or where the newest was rolled back
    and was not named. Remote weights are read through `downloads`.
    """
    client = connect(tracking_uri)
    _refuse_unknown(client, name)
    with locked_experiment(client, name) as experiment:
        reap(client, name, experiment)
        candidate = find_candidate(client, name, version)
        trail = _settle(client, experiment, name, judge=judge, downloads=downloads)
        champion = _champion(client, name, trail)
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
        clearance = _cleared(
            client,
            candidate,
            judged=lambda: judge(candidate, None if is_champion else champion),
            to_insist=_to_insist(name, candidate),
            insist=insist,
            downloads=downloads,
        )
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
            insist=insist,
        )
        if not clearance.passed:
            return audit.close(client, entry, "refused")
        copied = _copy(client, name, candidate, number=entry.number)
        entry = audit.aim(client, entry, copied)
        client.set_registered_model_alias(name, CHAMPION, str(copied))
        return audit.close(client, entry, "promoted")


def rollback(name: str, *, tracking_uri: str, by: str, judge: Judge, downloads: Path) -> Entry:
    """Give the alias back to the champion before, once it is found to be whole, and return the audit entry.

    `judge` is for what was set in MLflow meanwhile. NoSuchVersionError where there is none; CandidateError where it is
    damaged, and the champion stays.
    """
    client = connect(tracking_uri)
    _refuse_unknown(client, name)
    with locked_experiment(client, name) as experiment:
        reap(client, name, experiment)
        trail = _settle(client, experiment, name, judge=judge, downloads=downloads)
        champion = _champion(client, name, trail)
        if champion is None:
            raise NoSuchVersionError(f"{name} has no champion to go back from. Promote one: relex promote {name}.")
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
            reason=_was_before(target, champion),
            by=by,
            digest=target.digest,
            candidate=None,
            from_version=champion.version,
            metrics={},
        )
        entry = audit.aim(client, entry, target.version)
        client.set_registered_model_alias(name, CHAMPION, str(target.version))
        return audit.close(client, entry, "rolled back")


def settle(name: str, *, tracking_uri: str, judge: Judge, downloads: Path) -> list[Entry]:
    """Judge what people set on MLflow's own pages since the last time, and return the new entries of the audit trail.

    A wish is judged as a promotion, and a former champion that was given the alias as a rollback; each version then
    says what came of it and why. What is refused is the champion no longer: the alias goes back to the one before, and
    away where there was none. Where there is nothing to judge, no lock is taken.
    """
    client = connect(tracking_uri)
    with refusals(client):
        trail = wishes.trail_of(client, name)
        if not wishes.read(client, name, trail) and all(entry.finished for entry in trail):
            return []
    with locked_experiment(client, name, seconds=_SETTLE_SECONDS) as experiment:
        reap(client, name, experiment)
        known = {entry.number for entry in trail}
        settled = _settle(client, experiment, name, judge=judge, downloads=downloads)
        return [entry for entry in settled if entry.asked and entry.number not in known]


def pending(name: str, *, tracking_uri: str) -> list[Wish]:
    """Return what was set on MLflow's own pages and is not judged yet."""
    client = connect(tracking_uri)
    with refusals(client):
        return wishes.read(client, name, wishes.trail_of(client, name))


def history(name: str, *, tracking_uri: str) -> list[Entry]:
    """Return the audit trail of `name`, oldest first; empty where nothing was ever promoted."""
    client = connect(tracking_uri)
    with refusals(client):
        return wishes.trail_of(client, name)


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


def _settle(
    client: "MlflowClient", experiment: "Experiment", name: str, *, judge: Judge, downloads: Path
) -> list[Entry]:
    """Answer every wish; the caller holds the lock and has cleared what was unfinished. Returns the whole trail."""
    trail = audit.read(client, experiment)
    for wish in wishes.read(client, name, trail):
        trail.append(_answer(client, experiment, name, wish, trail, judge=judge, downloads=downloads))
    return trail


def _answer(
    client: "MlflowClient",
    experiment: "Experiment",
    name: str,
    wish: Wish,
    trail: Sequence[Entry],
    *,
    judge: Judge,
    downloads: Path,
) -> Entry:
    champion = _champion(client, name, trail)
    asked = client.get_model_version(wish.model, str(wish.version))
    candidate = _candidate_of(client, name, asked)
    is_champion = champion is not None and candidate is not None and champion.digest == candidate.digest
    goes_back = champion is not None and wish.model == name and wish.version in audit.stack(trail)[:-1]
    if candidate is None:
        clearance = _refused(f"{wish.title} is no copy of a prediction that relex registered: see relex models {name}.")
    elif is_champion and champion is not None:
        clearance = Clearance(passed=True, reason=f"It is the champion already, as {champion.title}.", metrics={})
    else:
        wanted = row(client, asked, champion=False)

        def judged() -> Clearance:
            if goes_back and champion is not None:
                return Clearance(passed=True, reason=_was_before(wanted, champion), metrics={})
            return judge(candidate, champion)

        clearance = _cleared(
            client,
            wanted,
            judged=judged,
            to_insist=_to_insist(name, candidate),
            insist=wish.insist,
            downloads=downloads,
        )
    entry = audit.begin(
        client,
        experiment,
        "rollback" if goes_back else "promote",
        number=_next(trail),
        title=f"{wish.title} set in MLflow",
        reason=clearance.reason,
        by=_BY_HAND,
        digest="" if candidate is None else candidate.digest,
        candidate=None if candidate is None else candidate.version,
        from_version=None if champion is None else champion.version,
        metrics=clearance.metrics,
        asked=wish.asked,
        insist=wish.insist,
    )
    if is_champion or candidate is None or not clearance.passed:
        entry = audit.decide(client, entry, "stands" if is_champion else "refused")
    else:
        own = wish.model == name
        entry = audit.aim(client, entry, wish.version if own else _copy(client, name, candidate, number=entry.number))
        client.set_registered_model_alias(name, CHAMPION, str(entry.to_version))
        entry = audit.decide(client, entry, audit.DONE[entry.action])
    wishes.answer(client, name, entry)
    return audit.close(client, entry, entry.verdict)


def _cleared(
    client: "MlflowClient",
    version: RegisteredModelVersion,
    *,
    judged: Callable[[], Clearance],
    to_insist: str,
    insist: str,
    downloads: Path,
) -> Clearance:
    """Return what is `judged` of a version that is whole; who insists is heard then only."""
    try:
        verified(version, tracking_uri=client.tracking_uri, downloads=downloads)
        clearance = judged()
    except CandidateError as error:
        return _refused(str(error))
    if clearance.passed:
        return clearance
    if insist:
        return replace(
            clearance, passed=True, reason=f"Insisted on: {insist.rstrip('.')}. Without that: {clearance.reason}"
        )
    return replace(clearance, reason=f"{clearance.reason} {to_insist}")


def _to_insist(name: str, candidate: RegisteredModelVersion) -> str:
    return (
        f"To insist, say why: as the tag {INSIST} of this version in MLflow, or"
        f" relex promote {name} {candidate.version} --insist REASON."
    )


def _candidate_of(client: "MlflowClient", name: str, asked: "ModelVersion") -> RegisteredModelVersion | None:
    """Return the registered prediction that a version is, or is a copy of."""
    digest = asked.tags.get(DIGEST)
    known = None if digest is None else known_version(client, f"{name}{CANDIDATES}", digest)
    same = known is not None and all(asked.tags.get(tag) == known.tags.get(tag) for tag in (STEP, MODEL_ID, FILES))
    if known is None or not same or asked.run_id != known.run_id:
        return None
    return row(client, known, champion=False)


def _refused(reason: str) -> Clearance:
    return Clearance(passed=False, reason=reason, metrics={})


def _was_before(target: RegisteredModelVersion, champion: RegisteredModelVersion) -> str:
    return f"{target.title} was champion before {champion.title}."


def _champion(client: "MlflowClient", name: str, trail: Sequence[Entry]) -> RegisteredModelVersion | None:
    version = wishes.standing(client, name, trail)
    return None if version is None else row(client, version, champion=True)


def _next(trail: Sequence[Entry]) -> int:
    return trail[-1].number + 1 if trail else 1


def _copy(client: "MlflowClient", name: str, candidate: RegisteredModelVersion, *, number: int) -> int:
    known = known_version(client, name, candidate.digest)
    if known is not None:
        return int(known.version)
    ensure_registered_model(
        client, name, f"What was promoted of `{candidate.name}`; `{CHAMPION}` is the one that is served."
    )
    version = client.get_model_version(candidate.name, str(candidate.version))
    told = {key: value for key, value in version.tags.items() if key not in (ANSWER, INSIST)}
    # What MlflowClient.copy_model_version does, with the number of the entry from the first moment on.
    copied = client.create_model_version(
        name,
        source=f"models:/{candidate.name}/{candidate.version}",
        run_id=candidate.run_id,
        model_id=version.model_id,
        description=version.description,
        tags={**told, AUDIT: str(number)},
    )
    return int(copied.version)
