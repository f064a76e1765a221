"""The search on made-up scores, and the whole procedure on models whose accuracy is known."""

from dataclasses import replace
from typing import Literal

import pytest
from scipy.stats import binom

from evaluation.verdict.gate import Gate
from flows.decide.page import page
from flows.decide.procedure import decide
from flows.search.halving import first_subset, search, subsets
from flows.settings import Settings
from flows.state.decision import Decision, Model, Score
from tests.helpers.simulated import World

# An arc, as over targets: near ones win a little, far ones lose.
ARC = (0.01, 0.02, 0.03, 0.01, -0.02, -0.08) * 2
TRIALS = 120


def candidates(count: int) -> list[Model]:
    return [Model("candidate", 100 + row, str(row)) for row in range(count)]


@pytest.mark.parametrize(
    ("count", "problems", "batch", "sizes"),
    [
        (4, 500, 64, [500]),
        (5, 500, 64, [256, 500]),
        (12, 500, 64, [128, 256, 500]),
        (12, 500, 250, [250, 500]),
        (12, 5000, 64, [1280, 2560, 5000]),
        (40, 500, 64, [128, 256, 500]),
        (12, 150, 200, [150]),
        (12, 200, 50, [100, 200]),
    ],
)
def test_subsets_double_in_whole_batches_to_all_problems(
    count: int, problems: int, batch: int, sizes: list[int]
) -> None:
    assert subsets(count, problems, batch=batch) == sizes


def test_half_go_on_each_round_and_of_equals_the_nearest() -> None:
    asked: list[tuple[int, int]] = []

    def measure(model: Model, count: int) -> Score:
        asked.append((model.step, count))
        return Score(model, "selection", 0.5 if model.step < 110 else 0.4, 0.0, count)

    searched = search(candidates(12), sizes=subsets(12, 800, batch=50), measure=measure)
    assert [sum(count == size for _, count in asked) for size in (200, 400, 800)] == [12, 6, 4]
    assert [score.model.step for score in searched.finalists] == [100, 101, 102, 103]
    assert {score.model.step for score in searched.dropped} == set(range(104, 112))
    assert [score.n for score in searched.dropped].count(200) == 6


def test_many_candidates_are_brought_down_to_the_finalists_in_the_rounds_there_are() -> None:
    asked: list[int] = []

    def measure(model: Model, count: int) -> Score:
        asked.append(count)
        return Score(model, "selection", 1.0 / model.step, 0.0, count)

    searched = search(candidates(42), sizes=first_subset(500, batch=64), measure=measure)
    assert [asked.count(size) for size in (128, 256, 500)] == [42, 13, 4]
    assert [score.model.step for score in searched.finalists] == [100, 101, 102, 103]


def run(
    differences: tuple[float, ...], *, attempts: int, margin: float = 0.0, climbed: bool = False
) -> tuple[int, int]:
    """Return how many of the trials ended in a worse and in a better model, each re-armed after a refusal."""
    worse = better = 0
    for trial in range(TRIALS):
        for attempt in range(1, attempts + 1):
            # What a refused run shows later are other models.
            seed = 10 * trial + attempt
            world = World(differences, selection=500, gate=5000, margin=margin, seed=seed, climbed=climbed)
            decision = world.decide(attempt=(attempt, attempts))
            if decision.winner is not None and decision.verdict == "registered":
                better += world.differences[decision.winner] > -margin
                worse += world.differences[decision.winner] <= -margin
                break
    return worse, better


@pytest.mark.parametrize(
    ("differences", "attempts", "margin"),
    [
        ((0.0,) * 12, 1, 0.0),
        pytest.param((0.0,) * 12, 3, 0.0, marks=pytest.mark.slow),
        pytest.param((-0.01,) * 12, 3, 0.01, marks=pytest.mark.slow),
        pytest.param((0.0,) * 6 + (-0.05,) * 6, 3, 0.0, marks=pytest.mark.slow),
        ((0.0,) * 6 + (-0.05,) * 6, 1, 0.0),
    ],
    ids=["equals", "equals, re-armed", "worse by the margin", "equals and worse, re-armed", "equals and worse"],
)
def test_the_whole_procedure_promotes_what_is_no_better_at_most_once_in_twenty(
    differences: tuple[float, ...], attempts: int, margin: float
) -> None:
    # On a ladder, which ends where scores fall, and all at once.
    worse, _ = run(differences, attempts=attempts, margin=margin, climbed=attempts == 1)
    # More would come once in a thousand procedures that err once in twenty.
    assert worse <= binom.ppf(0.999, TRIALS, 0.05)


@pytest.mark.parametrize(
    ("differences", "attempts"),
    [(ARC, 1), (ARC, 3), ((0.03, *(-0.02,) * 11), 3)],
    ids=["arc", "arc, re-armed", "alone, re-armed"],
)
def test_three_points_more_are_found_four_times_in_five(differences: tuple[float, ...], attempts: int) -> None:
    worse, better = run(differences, attempts=attempts)
    assert better >= 0.8 * TRIALS
    assert worse == 0


@pytest.mark.parametrize(("lead", "verdict"), [(0.0, "registered"), (0.1, "keep training")])
def test_what_beats_the_last_observed_has_to_beat_the_best_observed_too(lead: float, verdict: str) -> None:
    world = World((0.1, lead), selection=500, gate=5000, margin=0.0, seed=0)
    # A real checkpoint as good as the candidate, or as the last observed one.
    ours, theirs = world.candidates
    best = replace(theirs, role="best", method="")
    world.candidates = (ours,)
    for name in ("selection", "gate"):
        world.add(best, like=theirs, benchmark=name)
    world.add(same := replace(world.observed, role="best"), like=world.observed, benchmark="gate")
    stages = replace(world.stages(), best=lambda *_: [best, same])
    decision = decide(world.settings, [24, 48], "key", stages, attempt=(1, 1))
    assert [each.reference for each in decision.gates] == ["last observed @ 48", "best observed @ 72"]
    assert decision.gates[0].passed
    assert decision.verdict == verdict


def test_nothing_is_scored_when_the_backtest_says_hold() -> None:
    world = World((), selection=500, gate=5000, margin=0.0, seed=0)
    decision = world.decide()
    assert decision.verdict == "keep training"
    assert decision.reason.startswith("The backtest says hold")
    assert decision.selection == ()


@pytest.mark.parametrize(
    ("held", "verdict", "said"),
    [
        (("passed", "passed"), "registered", ""),
        (("passed", "not shown"), "not shown", "It passed the gate, and it is not shown that it loses no more"),
        (("not shown", "worse"), "refused", "It passed the gate and loses elsewhere more than it may."),
    ],
)
def test_nothing_is_registered_unless_every_guard_is_shown_to_hold(
    held: tuple[Literal["passed", "not shown", "worse"], ...], verdict: str, said: str
) -> None:
    world = World((0.1,), selection=500, gate=5000, margin=0.0, seed=0)
    settings = world.settings.model_copy(update={"guards": {"plus": 2.0, "minus": 1.0}})
    asked: list[tuple[Model, Model, int]] = []

    def guard(settings: Settings, winner: Model, observed: Model, comparisons: int) -> list[Gate]:
        asked.append((winner, observed, comparisons))
        (alike,) = world.stages().gate(settings, winner, [observed], comparisons)
        return [
            replace(alike, benchmark=name, verdict=each, margin=margin / 100, upper_bound=-0.1)
            for (name, margin), each in zip(settings.guards.items(), held, strict=True)
        ]

    decision = decide(settings, [24, 48], "key", replace(world.stages(), guard=guard), attempt=(1, 3))
    assert asked == [(world.candidates[0], world.observed, 3)]
    assert (decision.verdict, [each.verdict for each in decision.guards]) == (verdict, [*held])
    assert decision.winner == world.candidates[0]
    assert decision.reason.startswith(said)
    told = [each.benchmark for each in decision.guards if each.sentence in decision.reason]
    assert told == {"registered": ["plus", "minus"], "refused": ["minus"], "not shown": ["minus"]}[verdict]
    assert Decision.from_json(decision.to_json()) == decision


def test_how_far_the_chosen_one_is_from_the_base_is_said_only_where_it_is_asked_for_and_decides_nothing() -> None:
    world = World((0.1,), selection=500, gate=5000, margin=0.0, seed=0)
    silent = world.decide()
    settings = world.settings.model_copy(update={"divergence": True})
    told = decide(settings, [24, 48], "key", world.stages(), attempt=(1, 1))
    assert silent.divergence is None
    assert told.divergence is not None
    assert told.divergence.sentence.endswith(
        "0.2 nats a token from the base and the last observed checkpoint 0.1, 2 times as far."
    )
    assert told.divergence.sentence in page(told, settings)
    assert Decision.from_json(told.to_json()) == told
    assert (told.verdict, told.reason) == (silent.verdict, silent.reason)


def test_guards_are_not_scored_for_what_does_not_pass_the_gate() -> None:
    world = World((0.0,), selection=50, gate=500, margin=0.0, seed=4)
    settings = world.settings.model_copy(update={"guards": {"plus": 2.0}})

    def guard(*_: object) -> list[Gate]:
        raise AssertionError

    decision = decide(settings, [24, 48], "key", replace(world.stages(), guard=guard), attempt=(1, 1))
    assert (decision.verdict, decision.guards) == ("keep training", ())


def test_the_champion_must_be_passed_too_with_the_error_that_all_windows_share() -> None:
    world = World((0.1,), selection=500, gate=5000, margin=0.0, seed=0)
    champion = Model("champion", 36, "champion")
    asked: list[tuple[list[Model], int]] = []

    def gate(settings: Settings, winner: Model, references: list[Model], comparisons: int) -> list[Gate]:
        asked.append((references, comparisons))
        (passed,) = world.stages().gate(settings, winner, [world.observed], comparisons)
        return [passed, replace(passed, reference=champion.title, verdict="not shown")]

    stages = replace(world.stages(), champion=lambda settings: [champion], gate=gate)
    decision = decide(world.settings, [24, 48], "key", stages, attempt=(2, 3))
    assert asked == [([world.observed, champion], 3)]
    assert [each.passed for each in decision.gates] == [True, False]
    assert decision.verdict == "keep training"
    assert champion.title in decision.reason
