"""Promotion: a registered candidate becomes the champion if its stored gate results say so.

Nothing is scored: the weights are verified, the per-problem results that were registered are paired again, with the
champion there is now, and deploy.champions moves the alias. What people set on MLflow's own pages is judged alike.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from deploy import champions, registry
from deploy.audit import Entry
from deploy.champions import Clearance
from deploy.registry import RegisteredModelVersion
from evaluation.errors import ComparisonError
from evaluation.verdict.gate import Gate, gate
from flows.decide.gate_results import GateResults, Scored
from flows.errors import PromotionError
from flows.state.decision import gate_metrics


@dataclass(frozen=True)
class Promotion:
    """What came of a promotion or a rollback of the registered model `name`."""

    name: str
    entry: Entry

    @property
    def sentence(self) -> str:
        """Return what happened in plain words."""
        entry = self.entry
        if entry.asked:
            return f"{entry.asked.replace('/', ' version ')}, set in MLflow, {self._answer}. {entry.reason}"
        there = f"{self.name} version {entry.to_version} (prediction {entry.digest[:12]})"
        was = "before there was none" if entry.from_version is None else f"before it was version {entry.from_version}"
        how = f"{entry.verdict} by {entry.by}"
        return f"{there} is the champion, {how}; {was}. {entry.reason}"

    @property
    def _answer(self) -> str:
        entry = self.entry
        if not entry.moved:
            return entry.verdict
        return f"stands: {self.name} version {entry.to_version} is the champion, {entry.verdict}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {"name": self.name, **asdict(self.entry)}


def promote(
    name: str, version: int | None, *, tracking_uri: str, by: str, downloads: Path, insist: str = ""
) -> Promotion:
    """Promote version `version` of `<name>-candidates`, the newest for None; of the champion nothing is done.

    PromotionError with the reason where the weights are damaged, or where the gate is not passed and nobody insists;
    the refusal is on record.
    """
    entry = champions.promote(
        name,
        version,
        tracking_uri=tracking_uri,
        by=by,
        judge=partial(judge, tracking_uri=tracking_uri),
        downloads=downloads,
        insist=insist,
    )
    if not entry.moved:
        raise PromotionError(f"{name}-candidates version {entry.candidate} is not promoted. {entry.reason}")
    return Promotion(name, entry)


def rollback(name: str, *, tracking_uri: str, by: str, downloads: Path) -> Promotion:
    """Give the alias back to the champion before; a DeployError says why that cannot be."""
    judges = partial(judge, tracking_uri=tracking_uri)
    return Promotion(
        name, champions.rollback(name, tracking_uri=tracking_uri, by=by, judge=judges, downloads=downloads)
    )


def settle(name: str, *, tracking_uri: str, downloads: Path) -> list[Promotion]:
    """Judge what people set on MLflow's own pages since the last time; each version says there what came of it."""
    judges = partial(judge, tracking_uri=tracking_uri)
    settled = champions.settle(name, tracking_uri=tracking_uri, judge=judges, downloads=downloads)
    return [Promotion(name, entry) for entry in settled]


def judge(
    candidate: RegisteredModelVersion, champion: RegisteredModelVersion | None, *, tracking_uri: str
) -> Clearance:
    """Return whether a candidate's stored results pass: no worse than what was observed, better than the champion."""
    try:
        return _judge(candidate, champion, tracking_uri=tracking_uri)
    except (ComparisonError, PromotionError) as error:
        return _refusal(f"{candidate.title} cannot be judged: {error}")


def _judge(
    candidate: RegisteredModelVersion, champion: RegisteredModelVersion | None, *, tracking_uri: str
) -> Clearance:
    ours = [GateResults.from_json(text) for text in registry.gate_reports(candidate, tracking_uri=tracking_uri)]
    if not ours:
        return _refusal(
            f"{candidate.title} was registered without its gate results. Register it again with them: decide again."
        )
    # Of several decisions on the same bytes the last one stands.
    latest = ours[-1]
    # A real checkpoint of a run without a decision was compared with the base, which it has to beat.
    observed = [scored for scored in latest.references if scored.model.role in ("observed", "best", "base")]
    if not observed and champion is None:
        return _refusal(f"{candidate.title} has no gate results of a last observed checkpoint. Decide again.")
    gates = [
        _gate(latest, latest.candidate, scored, margin=0.0 if scored.model.role == "base" else latest.margin)
        for scored in observed
    ]
    if champion is not None:
        theirs = [GateResults.from_json(text) for text in registry.gate_reports(champion, tracking_uri=tracking_uri)]
        compared = _compared(champion, candidate, latest, [*reversed(ours), *reversed(theirs)])
        if isinstance(compared, str):
            return _refusal(compared)
        gates.append(compared)
    failed = [each for each in gates if not each.passed]
    return Clearance(
        passed=not failed,
        reason=" ".join(each.sentence for each in failed or gates),
        metrics=gate_metrics(gates),
    )


def _compared(
    champion: RegisteredModelVersion,
    candidate: RegisteredModelVersion,
    terms: GateResults,
    known: Sequence[GateResults],
) -> Gate | str:
    """Return the first comparison with the champion that the stored results allow, or why there is none."""
    reason = f"{champion.title} was registered without its gate results."
    for theirs in _of(champion, known):
        for ours in _of(candidate, known):
            try:
                compared = _gate(terms, ours, replace(theirs, model=replace(theirs.model, role="champion")), margin=0.0)
            except ComparisonError as error:
                reason = str(error)
            else:
                return compared
    return (
        f"{candidate.title} cannot be compared with the champion, {champion.title}: {reason} A decision made from now"
        " on scores this champion beside its candidate: promote what that registers."
    )


def _of(version: RegisteredModelVersion, known: Sequence[GateResults]) -> Iterator[Scored]:
    for results in known:
        for scored in (results.candidate, *results.references):
            if scored.model.digest == version.digest:
                yield scored


def _gate(terms: GateResults, ours: Scored, theirs: Scored, *, margin: float) -> Gate:
    judged = gate(
        ours.report,
        theirs.report,
        margin=margin,
        confidence=terms.confidence,
        comparisons=terms.comparisons,
        look=terms.look,
    )
    return replace(judged, candidate=ours.model.title, reference=theirs.model.title)


def _refusal(reason: str) -> Clearance:
    return Clearance(passed=False, reason=reason, metrics={})
