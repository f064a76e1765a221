"""What people set on MLflow's own pages: the version they want as champion, and the answer that is written on it.

A wish is the alias champion on a version that the audit trail does not explain, a version that "Promote model" copied
into `<name>`, or the tag relex.insist. Its answer is an entry of the trail; what of it is missing on the version is
written by whoever comes next.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from deploy import audit
from deploy.audit import Entry
from deploy.versions import CANDIDATES, CHAMPION, champion_version, versions

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# Tags of a version: a person's reason why it is to be champion all the same, and, for people, what came of it.
INSIST = "relex.insist"
ANSWER = "set_in_mlflow"
_HEAD = "**Set in MLflow"
# MLflow takes no longer description.
_LONGEST = 5000


@dataclass(frozen=True)
class Wish:
    """A version that somebody wants as champion; `insist` is their reason to have it all the same, mostly empty."""

    model: str
    version: int
    insist: str

    @property
    def asked(self) -> str:
        """How an entry of the audit trail names it."""
        return f"{self.model}/{self.version}"

    @property
    def title(self) -> str:
        """What a sentence calls it."""
        return f"{self.model} version {self.version}"


def standing(client: "MlflowClient", name: str, trail: Sequence[Entry]) -> "ModelVersion | None":
    """Return the champion that the audit trail explains, None where there is none or somebody took the alias away.

    Where the alias is on another version, nobody has judged that one yet.
    """
    alias = champion_version(client, name)
    if alias is None:
        return None
    # It is aimed at once it has passed.
    if trail and not trail[-1].finished and trail[-1].to_version == int(alias.version):
        return alias
    for version in reversed(audit.stack(trail)):
        if version == int(alias.version):
            return alias
        if kept := next(versions(client, f"name = '{name}' and version_number = {version}"), None):
            return kept
    return None


def trail_of(client: "MlflowClient", name: str) -> list[Entry]:
    """Return the audit trail of `name`, oldest first; empty where nothing was ever promoted."""
    experiment = client.get_experiment_by_name(name)
    return [] if experiment is None else audit.read(client, experiment)


def read(client: "MlflowClient", name: str, trail: Sequence[Entry]) -> list[Wish]:
    """Return the wishes that the trail does not answer: aliases first, then insisting, then copies, oldest first."""
    wishes: dict[str, Wish] = {}
    for version in _wanted(client, name, trail):
        wish = Wish(version.name, int(version.version), version.tags.get(INSIST, "").strip())
        wishes.setdefault(wish.asked, wish)
    return list(wishes.values())


def answer(client: "MlflowClient", name: str, entry: Entry) -> None:
    """Write on the version what came of it, and take back what does not stand; again it changes nothing."""
    model, _, number = entry.asked.rpartition("/")
    asked = next(versions(client, f"name = '{model}' and version_number = {number}"), None)
    if asked is not None:
        _describe(client, name, asked, entry)
    alias = champion_version(client, model)
    if alias is None or int(alias.version) != int(number) or (model == name and entry.moved):
        return
    former = None
    if model == name and entry.from_version is not None:
        former = next(versions(client, f"name = '{name}' and version_number = {entry.from_version}"), None)
    if former is None:
        client.delete_registered_model_alias(model, CHAMPION)
    else:
        client.set_registered_model_alias(name, CHAMPION, str(former.version))


def _wanted(client: "MlflowClient", name: str, trail: Sequence[Entry]) -> Iterator["ModelVersion"]:
    settled = [entry for entry in trail if entry.verdict not in ("abandoned", "under way")]
    alias, champion = champion_version(client, name), standing(client, name, trail)
    if alias is not None and (champion is None or champion.version != alias.version):
        yield alias
    if (alias := champion_version(client, f"{name}{CANDIDATES}")) is not None:
        yield alias
    own = sorted(versions(client, f"name = '{name}'"), key=lambda version: int(version.version))
    insisted = {(entry.asked, entry.insist) for entry in settled}
    for version in [*own, *versions(client, f"name = '{name}{CANDIDATES}' and tags.`{INSIST}` LIKE '%'")]:
        reason = version.tags.get(INSIST, "").strip()
        if reason and (f"{version.name}/{version.version}", reason) not in insisted:
            yield version
    known = {number for entry in settled for number in (entry.from_version, entry.to_version)}
    answered = {entry.asked for entry in settled}
    for version in own:
        if int(version.version) not in known and f"{name}/{version.version}" not in answered:
            yield version


def _describe(client: "MlflowClient", name: str, asked: "ModelVersion", entry: Entry) -> None:
    stands = entry.moved or entry.verdict == "stands"
    when = datetime.fromtimestamp(entry.at_ms / 1000, UTC).strftime("%Y-%m-%d %H:%M UTC")
    on_record = f"[entry {entry.number}]({entry.url})" if entry.url else f"entry {entry.number}"
    head = f"{_HEAD}: {'it stands' if stands else 'refused'}** ({when}, {on_record} of the audit trail). {entry.reason}"
    if entry.moved and entry.asked != f"{name}/{entry.to_version}":
        head += f" It is {name} version {entry.to_version} now."
    elif not stands:
        there = f"{name} version {entry.from_version}" if entry.from_version is not None else "none, as before"
        head += f" The champion is {there}."
    kept = asked.description or ""
    if kept.startswith(_HEAD):
        kept = kept.partition("\n\n")[2]
    if not kept and entry.candidate is not None and asked.name == name:
        # MLflow's page copies no description.
        candidate = client.get_model_version(f"{name}{CANDIDATES}", str(entry.candidate)).description or ""
        kept = candidate.partition("\n\n")[2] if candidate.startswith(_HEAD) else candidate
    client.update_model_version(asked.name, asked.version, "\n\n".join(filter(None, (head, kept)))[:_LONGEST])
    client.set_model_version_tag(asked.name, asked.version, ANSWER, "stands" if stands else "refused")
