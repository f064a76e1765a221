"""Outlook: what training on may still win after a registered winner, in points, by several rules.

Only the ceiling decides about stopping: accuracy cannot exceed it, so that training on wins at most the ceiling less
the lower bound of the winner's accuracy on the gate. What a run does after the window cannot be seen in it, so the
other rules are shown, with how they did on the runs they were tried on, and decide nothing until a record of finished
runs speaks for them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from flows.settings import Settings
from flows.state.decision import Decision, Score
from flows.state.finished import read_finished, vote
from flows.state.windows import read_decisions

Rule = Literal["ceiling", "last rung", "backcast", "growth", "forecast"]

# How each rule did where it was tried: nine runs of 480 steps, windows of which 1.9 to 8 make the planned end. The last
# rung and the backcast were tried in forms that cost more answers; these are what a decision has at hand.
EVIDENCE: Mapping[Rule, str] = {
    "ceiling": "at 5 points it stopped 13 looks of four fresh runs, none cost more than 2 points; at 2 points none"
    " of ten more runs",
    "last rung": "tried with a rung a quarter beyond the end, it stopped 80 looks of nine runs, 23 of them cost more"
    " than 2 points, the worst 12.4; one of two on ten more runs, 2.6",
    "backcast": "tried with the same decision one scale earlier, it stopped 77 looks of nine runs, 19 of them cost more"
    " than 2 points, the worst 13.9",
    "growth": "stops lost up to 25 points",
    "forecast": "stops lost 6 to 25 points",
}
_MEANING: Mapping[Rule, str] = {
    "last rung": "the ladder's last rung won",
    "backcast": "the run won over an earlier winner by its step",
    "growth": "going on by as much a doubling would win",
    "forecast": "an exponential through the observed scores would win",
}


@dataclass(frozen=True)
class Room:
    """The most that training on may win: the `ceiling` less what the winner has `at_least`, on problems of the gate."""

    benchmark: str
    n: int
    accuracy: float
    at_least: float
    confidence: float
    ceiling: float

    @property
    def points(self) -> float:
        """Return it in points, never below 0."""
        return max(0.0, 100 * (self.ceiling - self.at_least))

    @property
    def sentence(self) -> str:
        """Return it in plain words, without a full stop."""
        return (
            f"Training on may win at most {self.points:.1f} points: on {self.n} problems of {self.benchmark} the winner"
            f" scores {self.accuracy:.4f}, at least {self.at_least:.4f} ({100 * self.confidence:.4g} %), and the"
            f" ceiling is {self.ceiling:g}"
        )


def room(settings: Settings, decision: Decision) -> Room | None:
    """Return what a decision leaves to win; None where none was registered, or an earlier version did not say."""
    if decision.verdict != "registered" or not decision.gates:
        return None
    gate = decision.gates[0]
    if gate.candidate_at_least is None:
        return None
    return Room(
        gate.benchmark,
        gate.n,
        gate.candidate_accuracy,
        gate.candidate_at_least,
        gate.confidence_each,
        settings.ceiling,
    )


def outlook(settings: Settings, decision: Decision) -> dict[Rule, float]:
    """Return the points that each rule says training on may win; a rule that has nothing to go by is left out."""
    points_by_rule: dict[Rule, float] = {}
    left = room(settings, decision)
    if left is not None:
        points_by_rule["ceiling"] = left.points
    winner, end = decision.winner, settings.total_steps
    if winner is None or decision.verdict != "registered":
        return points_by_rule
    rungs = sorted(
        (score.model.step, score.accuracy) for score in decision.selection if score.model.method == winner.method
    )
    if len(rungs) > 1 and end is not None and rungs[-1][0] >= end:
        points_by_rule["last rung"] = 100 * (rungs[-1][1] - rungs[-2][1])
    earlier = [each for each in read_decisions(settings) if each.window < decision.window]
    observed = {each.window: _observed(each.selection) for each in (*earlier, decision)}
    points = [(step, accuracy) for step, accuracy in sorted(observed.items()) if accuracy is not None]
    reached = [each for each in earlier if each.winner is not None and each.winner.step <= decision.window]
    then = _accuracy(reached[-1]) if reached else None
    if then is not None and points:
        points_by_rule["backcast"] = 100 * (points[-1][1] - then)
    ours = _accuracy(decision)
    if ours is None or end is None:
        return points_by_rule
    if len(points) > 1:
        points_by_rule["growth"] = 100 * (_doubling(points, end) - ours)
    if len(points) > 2:
        points_by_rule["forecast"] = 100 * (_saturating(points, end) - ours)
    return points_by_rule


def voted(settings: Settings, decision: Decision) -> list[Rule]:
    """Return the rules that the record of finished runs lets stop at this look (see flows.state.finished)."""
    runs = read_finished(settings.state)
    said = []
    for rule, points in outlook(settings, decision).items():
        allowed = vote(runs, rule, price=settings.stop_price)
        if allowed is not None and points <= allowed:
            said.append(rule)
    return said


def sentence(points: Mapping[Rule, float]) -> str:
    """Return what the rules that decide nothing say, each with how it did; nothing where none says anything."""
    said = [
        f"{_MEANING[rule]} {value:+.1f} points ({EVIDENCE[rule]})" for rule, value in points.items() if rule in _MEANING
    ]
    return f"Deciding nothing: {'; '.join(said)}." if said else ""


def _observed(scores: Sequence[Score]) -> float | None:
    return next((score.accuracy for score in scores if score.model.role == "observed"), None)


def _accuracy(decision: Decision) -> float | None:
    """Return the winner's accuracy on the selection problems."""
    return next((score.accuracy for score in decision.selection if score.model == decision.winner), None)


def _doubling(points: Sequence[tuple[int, float]], end: int) -> float:
    (before, low), (last, high) = points[-2:]
    return high + (high - low) / math.log2(last / before) * math.log2(max(end, last) / last)


def _saturating(points: Sequence[tuple[int, float]], end: int) -> float:
    """Return where an exponential approach through the last three points is at `end`, a line where they do not bend.

    Its rate falls by the same factor every step, which is found from the mean rates of both stretches.
    """
    (first, low), (middle, between), (last, high) = points[-3:]
    early, late = (between - low) / (middle - first), (high - between) / (last - middle)
    if early <= 0 or not 0 < late < early:
        return high + max(late, 0.0) * max(end - last, 0)
    decay = math.log(early / late) / ((last - first) / 2)
    now = late * math.exp(-decay * (last - middle) / 2)
    return high + now * -math.expm1(-decay * max(end - last, 0)) / decay
