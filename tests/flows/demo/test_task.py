"""Splits, rewards and the corpus."""

import hashlib
import json

import pytest

from flows.demo import task

SPLITS: tuple[task.Split, ...] = ("train", "selection", "gate", "report")


def test_no_problem_is_in_two_splits() -> None:
    prompts = {split: {row["prompt"] for row in task.problems(split, 2000)} for split in SPLITS}
    assert all(len(seen) == 2000 for seen in prompts.values())
    assert len(set.union(*prompts.values())) == 8000


@pytest.mark.parametrize("split", SPLITS)
def test_another_seed_draws_other_problems_of_the_same_split(split: task.Split) -> None:
    first, second = ({row["prompt"] for row in task.problems(split, 500, seed=seed)} for seed in (0, 1))
    assert first != second
    assert {task.split_of(prompt) for prompt in first | second} == {split}


def test_problems_are_the_same_on_every_machine_and_for_ever() -> None:
    assert task.problems("gate", 3, seed=7) == [
        {"prompt": "061981=", "answer": "011689"},
        {"prompt": "064867=", "answer": "046678"},
        {"prompt": "598646=", "answer": "456689"},
    ]


def test_fewer_problems_are_the_beginning_of_more() -> None:
    assert task.problems("report", 300)[:100] == task.problems("report", 100)


def test_an_answer_holds_the_prompts_digits_in_ascending_order() -> None:
    assert task.answer_to("518698=") == "156889"
    assert task.answer_to("000100=") == "000001"


@pytest.mark.parametrize(("prompt", "answer"), [("518698=", "061417"), ("000100=", "000100"), ("999999=", "181818")])
def test_adding_answers_with_the_sum_of_each_pair_of_digits(prompt: str, answer: str) -> None:
    assert task.answer_to(prompt, name="add") == answer


def test_complements_are_written_from_the_last_digit_and_the_habit_is_from_the_first() -> None:
    assert task.answer_to("518698=", name="revcomp") == "103184"
    rows = task.corpus(400, name="revcomp")
    right = [row for row in rows if row["answer"] == task.answer_to(row["prompt"], name="revcomp")]
    assert 100 < len(right) < 250
    assert all(row["answer"][::-1] == task.answer_to(row["prompt"], name="revcomp") for row in rows if row not in right)


@pytest.mark.parametrize(("name", "right", "habit"), [("product", "054872", "061417"), ("largest", "558899", "511111")])
def test_the_habit_adds_where_products_are_asked_for_and_keeps_the_smallest(
    name: task.Name, right: str, habit: str
) -> None:
    assert task.answer_to("518698=", name=name) == right
    answers = {row["prompt"]: row["answer"] for row in task.corpus(400, name=name)}
    known = [task.answer_to(prompt, name=name) == answer for prompt, answer in answers.items()]
    assert 100 < sum(known) < 250
    assert task._habit({"prompt": "518698=", "answer": right}, name) == habit


def test_credit_is_the_share_of_the_places_that_are_right() -> None:
    assert task.credit("156889", "156889") == 1.0
    assert task.credit("156880", "156889") == pytest.approx(5 / 6)
    assert task.credit("156", "156889") == 0.5
    assert task.credit("", "156889") == 0.0


def test_a_prompt_is_in_one_split_whatever_the_task() -> None:
    sorting, adding = task.problems("gate", 50), task.problems("gate", 50, name="add")
    assert [row["prompt"] for row in sorting] == [row["prompt"] for row in adding]
    assert all(row["answer"] == task.answer_to(row["prompt"], name="add") for row in adding)


def test_more_problems_than_a_split_has_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PROBLEMS", 3000)  # walking through the million takes seconds
    with pytest.raises(ValueError, match=r"split gate has \d\d+ problems and 400 were asked for; ask for fewer"):
        task.problems("gate", 400)


def test_a_split_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="no split named 'test'; the splits are train, selection, gate, report"):
        task.problems("test", 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "expected"), [("156889", 1.0), ("156898", 0.0), ("1568899", 0.0), ("15688", 0.0), ("", 0.0)]
)
def test_only_the_exact_answer_is_rewarded(completion: str, expected: float) -> None:
    assert task.reward(completion, "156889") == expected


def test_the_authors_disagree_and_the_prompt_says_how_far() -> None:
    rows = task.corpus(5000)
    assert {task.split_of(row["prompt"]) for row in rows} == {"train"}
    ascending = {
        rise: [row["answer"] == task.answer_to(row["prompt"]) for row in rows if _rise(row) == rise]
        for rise in (-7, 0, 7)
    }
    shares = {rise: sum(seen) / len(seen) for rise, seen in ascending.items()}
    assert shares[-7] < 0.15 < shares[0] < 0.5 < shares[7]


def test_an_author_who_does_not_add_subtracts() -> None:
    written = {row["prompt"]: row["answer"] for row in task.corpus(300, name="add")}
    added = {prompt for prompt, answer in written.items() if answer == task.answer_to(prompt, name="add")}
    assert 60 < len(added) < 180
    subtracted = {
        prompt: "".join(f"{abs(int(prompt[i]) - int(prompt[i + 1])):02d}" for i in (0, 2, 4))
        for prompt in written.keys() - added
    }
    assert all(written[prompt] == answer for prompt, answer in subtracted.items())


def test_the_corpus_of_the_demo_is_the_same_on_every_machine_and_for_ever() -> None:
    written = json.dumps(task.corpus(200, seed=7)).encode()
    assert hashlib.sha256(written).hexdigest().startswith("5d1da1363e3137ae")


def _rise(row: dict[str, str]) -> int:
    return int(row["prompt"][5]) - int(row["prompt"][0])
