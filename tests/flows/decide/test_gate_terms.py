"""The terms of the gate: who is compared by which margin, and what a promotion judges by later."""

from dataclasses import replace

from flows.decide.flow import gate_scored
from flows.decide.gate_results import GateResults, gate_results_path
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


def test_more_windows_make_every_gate_harder(settings: Settings) -> None:
    scored = [(WINNER, report(26)), (OBSERVED, replace(report(20), model="observed"))]
    bounds = [gate_scored(settings, scored, comparisons)[0].lower_bound for comparisons in (1, 3, 9)]
    assert bounds == sorted(bounds, reverse=True)
    assert len(set(bounds)) == 3
