"""The terms of the gate: who is compared by which margin, and what a promotion judges by later."""

from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.verdict.gate import Gate
from evaluation.verdict.report import Report
from flows.decide.gate_results import GateResults, gate_results_path
from flows.decide.stages import gate_scored, guard_scored
from flows.settings import Settings
from flows.state.decision import Model
from tests.helpers.registry import report

WINNER = Model("candidate", 240, "predicted", "relex", "d1")
OBSERVED = Model("observed", 40, "seen")
CHAMPION = Model("champion", 120, "promoted", digest="d0")


def test_the_margin_is_for_what_was_observed_and_a_champion_has_to_be_beaten(settings: Settings) -> None:
    settings = settings.model_copy(update={"margin": 0.5})
    ours = report(20)
    observed, champion = gate_scored(settings, [(WINNER, ours), (OBSERVED, ours), (CHAMPION, ours)], 3)
    assert (observed.margin, observed.verdict) == (0.5, "passed")
    assert (champion.margin, champion.verdict) == (0.0, "not shown")
    assert (observed.candidate, champion.reference) == (WINNER.title, CHAMPION.title)


def test_what_is_kept_holds_the_terms_of_the_gate(settings: Settings) -> None:
    settings = settings.model_copy(update={"margin": 0.25, "confidence": 0.9})
    scored = [(WINNER, report(30)), (OBSERVED, report(20)), (CHAMPION, report(10))]
    assert {gate.comparisons for gate in gate_scored(settings, scored, 3)} == {3}
    kept = GateResults.from_json(gate_results_path(settings, WINNER).read_text())
    assert (kept.margin, kept.confidence, kept.comparisons) == (0.25, 0.9, 3)
    assert [(each.model, each.report) for each in (kept.candidate, *kept.references)] == scored


def test_guards_share_the_error_and_each_has_its_own_margin_and_its_own_looks(settings: Settings) -> None:
    settings = settings.model_copy(update={"guards": {"a.yaml": 50.0, "b.yaml": 2.0}, "confidence": 0.9})
    names = ("plus", "minus")

    def of(name: str, right: int) -> Report:
        each = report(right)
        return replace(each, benchmark=name, scores=tuple((f"{name} {problem}", one) for problem, one in each.scores))

    ours, theirs = ([of(name, right) for name in names] for right in (20, 24))

    def judged() -> list[Gate]:
        return guard_scored(settings, (WINNER, ours), (OBSERVED, theirs), 2)

    first, second = judged()
    assert [(each.benchmark, each.margin) for each in (first, second)] == [("plus", 0.5), ("minus", 0.02)]
    assert (first.verdict, second.verdict) == ("passed", "not shown")
    # Half of a tenth each, of which two windows share four fifths.
    assert [each.error for each in (first, second)] == pytest.approx([0.02, 0.02])
    assert [each.look for each in (first, second)] == [1, 1]
    assert "look 1 at plus, 95 % over all looks" in first.sentence
    assert judged() == [first, second]


def test_more_windows_make_every_gate_harder(settings: Settings, tmp_path: Path) -> None:
    scored = [(WINNER, report(26)), (OBSERVED, replace(report(20), model="observed"))]
    places = {
        comparisons: settings.model_copy(update={"state": tmp_path / f"{comparisons}"}) for comparisons in (1, 3, 9)
    }
    bounds = [gate_scored(place, scored, comparisons)[0].lower_bound for comparisons, place in places.items()]
    assert bounds == sorted(bounds, reverse=True)
    assert len(set(bounds)) == 3


def test_every_decision_of_a_run_is_one_look_at_its_gate_whatever_is_edited(settings: Settings) -> None:
    def decided(number: int, **edited: object) -> Gate:
        ours = replace(report(26), model_digest=f"candidate {number}")
        scored = [(WINNER, ours), (OBSERVED, report(20)), (CHAMPION, report(10))]
        return gate_scored(settings.model_copy(update=edited), scored, 1)[0]

    first = decided(1)
    assert first.look == 1
    assert first.error == pytest.approx(0.04)
    # Killed and done again, or edited in what changes no model: the same look, with the error it had.
    assert decided(1, attempts=5) == first
    second = decided(2, methods=["raw"], targets=[300], window=40)
    assert second.look == 2
    assert second.error == pytest.approx(0.005)
    assert second.lower_bound < first.lower_bound
    assert "look 2 at digits-gate, 95 % over all looks" in second.sentence
    kept = GateResults.from_json(gate_results_path(settings, WINNER).read_text())
    assert kept.look is not None
    assert (kept.look.number, kept.look.error) == (2, second.error)
