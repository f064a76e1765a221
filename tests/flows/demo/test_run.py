"""What the demo asks for, and what it says of stopping."""

from pathlib import Path

from flows.demo.run import STEPS, WINDOW, Demonstration, prepare, what_stopping_costs
from flows.settings import load_settings
from flows.state.decision import Decision, Model, Score
from flows.stop.plan import configured


def scored(role: str, step: int, accuracy: float) -> Score:
    return Score(Model(role, step, "", "secant"), "report", accuracy, 0.01, 1000)  # type: ignore[arg-type]


def demonstration(*, registers: bool) -> Demonstration:
    winner = scored("candidate", 144, 0.974)
    decision = Decision(
        "sort",
        "key",
        WINDOW,
        (WINDOW,),
        "registered" if registers else "keep training",
        "",
        report=(scored("observed", WINDOW, 0.653), winner),
        winner=winner.model if registers else None,
    )
    later = (scored("observed", 120, 0.949), scored("observed", STEPS, 0.983))
    return Demonstration(decision, later, Path("figure"), "", "", 1.0)


def test_the_demo_may_offer_a_stop_and_says_at_what_price(tmp_path: Path) -> None:
    settings = load_settings(prepare(tmp_path))
    assert configured(settings)
    assert (settings.stop, settings.stop_price) == ("approve", 5.0)


def test_the_demo_says_what_a_stop_would_have_cost() -> None:
    said = what_stopping_costs(demonstration(registers=True))
    assert said == "This run went on, to see: a stop would have saved 312 of 360 steps and cost 0.9 points."
    assert what_stopping_costs(demonstration(registers=False)) == ""
