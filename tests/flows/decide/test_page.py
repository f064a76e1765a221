import json
from dataclasses import replace

from flows.decide.choose import choose
from flows.decide.page import page
from flows.settings import Settings
from flows.state.decision import Backtested, Decision, Model, Score
from tests.helpers.gates import GATE

SETTINGS = Settings(
    training_run="tiny",
    checkpoints="/runs/tiny",
    base="/models/base",
    window=48,
    targets=[120, 240],
    selection="selection",
    gate="gate",
    registered_model="tiny",
)
OBSERVED = Model("observed", 48, "/models/observed/step-48")


def score(accuracy: float, *, step: int = 48, role: str = "candidate") -> Score:
    model = OBSERVED if role == "observed" else Model("candidate", step, f"/models/relex/step-{step}", "relex", "abc")
    return Score(model, "selection", accuracy, 0.02, 500)


def test_the_best_candidate_is_chosen_and_of_equals_the_nearest() -> None:
    scores = [score(0.4, role="observed"), score(0.7, step=360), score(0.7, step=240), score(0.6, step=120)]
    chosen, reason = choose(scores, margin=0.0)
    assert chosen is not None
    assert chosen.model.step == 240
    assert "relex @ 240 scores 0.7000" in reason


def test_none_is_chosen_when_none_is_ahead_of_the_last_observed() -> None:
    chosen, reason = choose([score(0.4, role="observed"), score(0.4, step=240), score(0.3, step=120)], margin=0.0)
    assert chosen is None
    assert "No candidate is ahead" in reason
    assert "0.4000" in reason


def test_a_margin_lets_a_candidate_through_that_is_a_little_behind() -> None:
    scores = [score(0.40, role="observed"), score(0.38, step=240)]
    assert choose(scores, margin=0.03)[0] == scores[1]
    chosen, reason = choose(scores, margin=0.01)
    assert chosen is None
    assert "No candidate is within 0.01 of the last observed checkpoint" in reason


def test_a_decision_survives_its_json_and_its_page_has_every_number() -> None:
    winner = score(0.71, step=240)
    decision = Decision(
        "tiny",
        "0123",
        48,
        (8, 48),
        "registered",
        "because",
        selection=(score(0.4, role="observed"), winner),
        report=(score(0.41, role="observed"),),
        gates=(GATE,),
        winner=winner.model,
        registered="tiny-candidates version 1",
    )
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision
    text = page(decision, SETTINGS)
    assert "skill of the weights" not in text
    promised = replace(winner, model=replace(winner.model, skill_at_least=0.61))
    assert "| 0.61 |" in page(replace(decision, selection=(score(0.4, role="observed"), promised)), SETTINGS)
    for piece in ("0.7100", "0.4100", "+27.00", "tiny-candidates version 1", "steps 8 to 48"):
        assert piece in text


def registered() -> Decision:
    winner = score(0.71, step=240)
    return Decision(
        "tiny",
        "0123",
        48,
        (8, 48),
        "registered",
        f"It is so. {GATE.sentence}",
        backtested=Backtested("trusted", (44, 46, 48), "relex", 1.0, 0.8, 0.6, 120, "it is a line"),
        selection=(score(0.4, role="observed"), winner, score(0.6, step=120)),
        gates=(GATE,),
        winner=winner.model,
        registered="tiny-candidates version 3",
    )


def test_a_page_says_each_thing_once_what_the_model_is_and_what_to_do_next() -> None:
    text = page(registered(), SETTINGS)
    assert text.count(GATE.sentence) == 1
    for piece in (
        "# tiny: registered relex @ 240",
        "- Model: `/models/relex/step-240`",
        "- Base: `/models/base`",
        "- Training run: `/runs/tiny`, 2 checkpoints",
        "- Next: `relex promote tiny 3` makes it the champion",
    ):
        assert piece in text, piece
    refused = replace(registered(), verdict="keep training", reason="Not shown.", registered="")
    assert "- Next: the training goes on; nothing is to be done here" in page(refused, SETTINGS)
    # What the reason leaves out is said where the gate is.
    assert page(refused, SETTINGS).count(GATE.sentence) == 1
    assert "attempt 2" in page(replace(refused, attempts=3), SETTINGS)


def test_a_page_says_what_each_guard_shows_and_that_one_refused() -> None:
    held = replace(GATE, benchmark="plus", margin=0.02, difference=-0.001, lower_bound=-0.015)
    broken = replace(held, benchmark="minus", difference=-0.08, lower_bound=-0.1, upper_bound=-0.06, verdict="worse")
    refused = replace(
        registered(), verdict="refused", reason=f"It loses. {broken.sentence}", registered="", guards=(held, broken)
    )
    text = page(refused, SETTINGS)
    for piece in (
        "# tiny: refused",
        "## Guards (refuse)",
        "relex @ 240 against last observed @ 48: what it must not lose.",
        "| plus | -0.10 |  | -1.50 | -2 | passed |",
        "| minus | -8.00 |  | -10.00 | -2 | worse |",
        "- Next: the training goes on",
    ):
        assert piece in text, piece
    assert text.count(broken.sentence) == text.count(held.sentence) == 1
    assert Decision.from_json(json.loads(json.dumps(refused.to_json()))) == refused
    # One that was made before there were guards.
    old = registered().to_json()
    del old["guards"]
    assert Decision.from_json(old).guards == ()


def test_a_page_says_why_scores_overruled_the_backtest_and_only_then() -> None:
    text = page(registered(), SETTINGS)
    assert "trusts no step beyond 120" in text
    assert "relex @ 240 scores 0.7100 on 500 selection problems" in text
    assert "the best of those that it trusts, relex @ 120, 0.6000" in text
    assert registered().backtested is not None
    far = replace(registered(), backtested=replace(registered().backtested, trusted_step=240))  # type: ignore[type-var]
    assert "trusts no step" not in page(far, SETTINGS)
    held = replace(registered(), backtested=replace(registered().backtested, state="hold", trusted_step=None))  # type: ignore[type-var]
    assert "trusts no step. It proposes" in page(held, SETTINGS)
