"""What is set on MLflow's own pages: judged like a promotion, answered on the version, served no further than that."""

import threading
from collections.abc import Callable

import pytest

from deploy import champions, registry
from deploy.registry import CHAMPION, Registered
from deploy.tracking import connect
from deploy.wishes import ANSWER, INSIST
from flows.errors import PromotionError
from flows.promote.promoter import settle_all
from flows.promote.promotion import Promotion
from tests.helpers import cli
from tests.helpers.registry import BEST, BETTER, GOOD, Registry


def press_promote(store: Registry, made: Registered) -> int:
    """Copy a version into `tiny`, as MLflow's button "Promote model" does."""
    client = connect(store.uri)
    source = client.get_model_version(made.name, str(made.version))
    if "tiny" not in [model.name for model in client.search_registered_models()]:
        client.create_registered_model("tiny")
    copied = client.create_model_version(
        "tiny", source=f"models:/{made.name}/{made.version}", run_id=source.run_id, tags=source.tags
    )
    return int(copied.version)


def set_alias(store: Registry, version: int, *, model: str = "tiny") -> None:
    connect(store.uri).set_registered_model_alias(model, CHAMPION, str(version))


def alias(store: Registry, model: str = "tiny") -> int | None:
    version = connect(store.uri).get_registered_model(model).aliases.get(CHAMPION)
    return None if version is None else int(version)


def said(store: Registry, version: int, *, model: str = "tiny") -> tuple[str, str]:
    """Return what a version's page says: its tag for people, and its description."""
    judged = connect(store.uri).get_model_version(model, str(version))
    return judged.tags.get(ANSWER, ""), judged.description or ""


def settled(store: Registry) -> Promotion:
    (done,) = store.settle()
    assert store.settle() == []
    return done


def test_promote_model_is_judged_and_stands_and_the_version_says_so(store: Registry) -> None:
    made = store.add(1, GOOD)
    assert press_promote(store, made) == 1
    done = settled(store)
    assert (done.entry.verdict, done.entry.by, done.entry.from_version) == ("promoted", "set in MLflow", None)
    assert (alias(store), store.champion()) == (1, 1)
    tag, description = said(store, 1)
    assert tag == "stands"
    assert description.startswith("**Set in MLflow: it stands**")
    assert "last observed @ 48 0.2000" in description
    # A later one, and by its alias.
    second = store.add(2, BEST)
    set_alias(store, press_promote(store, second))
    assert settled(store).entry.from_version == 1
    assert store.champion() == 2
    assert store.rollback().entry.to_version == 1


def test_an_alias_among_the_candidates_is_a_promotion_and_goes_where_champions_are(store: Registry) -> None:
    store.add(1, GOOD)
    set_alias(store, 1, model="tiny-candidates")
    assert settled(store).entry.to_version == 1
    assert (alias(store), alias(store, "tiny-candidates")) == (1, None)
    tag, description = said(store, 1, model="tiny-candidates")
    assert (tag, description.endswith("It is tiny version 1 now.")) == ("stands", True)
    assert said(store, 1) == ("", "")


def test_what_would_be_refused_is_champion_no_longer_and_says_why_and_how_to_insist(store: Registry) -> None:
    store.add(1, BETTER)
    store.promote()
    worse = store.add(2, GOOD)
    copied = press_promote(store, worse)
    set_alias(store, copied)
    # Until it is judged, nobody is served it.
    assert (store.champion(), [wish.title for wish in champions.pending("tiny", tracking_uri=store.uri)]) == (
        1,
        ["tiny version 2"],
    )
    done = settled(store)
    assert (done.entry.verdict, done.entry.from_version) == ("refused", 1)
    assert done.sentence.startswith("tiny version 2, set in MLflow, refused. ")
    assert (alias(store), store.champion()) == (1, 1)
    tag, description = said(store, copied)
    assert tag == "refused"
    assert "To insist, say why: as the tag relex.insist of this version in MLflow" in description
    assert description.endswith("The champion is tiny version 1.")
    # Set again, it is judged again, and the answer is there once.
    set_alias(store, copied)
    settled(store)
    assert said(store, copied)[1].count("**Set in MLflow") == 1


def test_where_there_was_no_champion_what_is_refused_leaves_none(store: Registry) -> None:
    made = store.add(1, 0)
    set_alias(store, press_promote(store, made))
    assert store.champion() is None
    assert settled(store).entry.verdict == "refused"
    assert (alias(store), store.champion()) == (None, None)


@pytest.mark.parametrize("model", ["tiny", "tiny-candidates"])
def test_who_insists_with_a_reason_is_heard_and_both_reasons_are_on_record(store: Registry, model: str) -> None:
    store.add(1, BETTER)
    store.promote()
    worse = store.add(2, GOOD)
    if model == "tiny":
        press_promote(store, worse)
        settled(store)
    client = connect(store.uri)
    client.set_model_version_tag(model, "2", INSIST, " a shorter answer is worth it ")
    done = settled(store)
    assert (done.entry.verdict, done.entry.to_version, done.entry.insist) == (
        "promoted",
        2,
        "a shorter answer is worth it",
    )
    assert done.entry.reason.startswith("Insisted on: a shorter answer is worth it. Without that: ")
    assert (alias(store), said(store, 2, model=model)[0]) == (2, "stands")
    assert INSIST not in client.get_model_version("tiny", "2").tags or model == "tiny"
    assert store.rollback().entry.to_version == 1
    assert store.settle() == []


def test_a_command_insists_with_a_reason_too(store: Registry) -> None:
    store.add(1, BETTER)
    store.promote()
    store.add(2, GOOD)
    with pytest.raises(PromotionError, match=r"To insist, .* relex promote tiny 2 --insist REASON"):
        store.promote()
    assert store.promote(insist="it is shorter").entry.to_version == 2


def test_nobody_insists_on_damaged_weights(store: Registry) -> None:
    made = store.add(1, GOOD)
    (made.weights / "model.safetensors").unlink()
    with pytest.raises(PromotionError, match="is not what was registered") as refusal:
        store.promote(insist="I want it")
    assert "To insist" not in str(refusal.value)
    connect(store.uri).set_model_version_tag(made.name, "1", INSIST, "I want it")
    assert settled(store).entry.verdict == "refused"
    assert store.champion() is None


def test_the_alias_on_a_former_champion_is_a_rollback_to_it(store: Registry) -> None:
    for number, solved in ((1, GOOD), (2, BETTER), (3, BEST)):
        store.add(number, solved)
        store.promote()
    set_alias(store, 1)
    done = settled(store).entry
    assert (done.verdict, done.from_version, done.to_version) == ("rolled back", 3, 1)
    assert "tiny version 1 was champion before tiny version 3" in said(store, 1)[1]
    # As after the command, a version that was rolled back is judged again.
    set_alias(store, 3)
    assert settled(store).entry.verdict == "promoted"
    assert store.rollback().entry.to_version == 1


def test_a_second_copy_of_the_champion_changes_nothing(store: Registry) -> None:
    made = store.add(1, GOOD)
    store.promote()
    set_alias(store, press_promote(store, made))
    done = settled(store)
    assert (done.entry.verdict, alias(store)) == ("stands", 1)
    assert "It is the champion already, as tiny version 1." in said(store, 2)[1]
    (listed,) = registry.models("tiny", tracking_uri=store.uri)
    assert listed.champion


@pytest.mark.parametrize("copied", [False, True])
def test_a_version_that_relex_knows_nothing_of_is_refused_whatever_it_says_of_itself(
    store: Registry, copied: bool
) -> None:
    store.add(1, GOOD)
    store.promote()
    client = connect(store.uri)
    other = store.home / "other" / "artifacts"
    other.mkdir(parents=True)
    tags = client.get_model_version("tiny", "1").tags if copied else {INSIST: "it is mine"}
    client.create_model_version("tiny", source=str(other), tags=tags)
    set_alias(store, 2)
    assert store.champion() == 1
    done = settled(store)
    assert (done.entry.verdict, alias(store)) == ("refused", 1)
    assert "tiny version 2 is no copy of a prediction that relex registered" in said(store, 2)[1]


def test_relex_models_shows_what_was_set_in_mlflow_with_its_verdict(
    store: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        status, out, _ = cli.relex(capsys, "models", "tiny", "--home", store.home)
        assert status == 0
        return out

    set_alias(store, press_promote(store, store.add(1, GOOD)))
    assert "champion" not in shown().splitlines()[1]
    assert "tiny version 1 is set as champion in MLflow and not judged yet" in shown()
    judged, troubles = settle_all(store.uri, store.home / "models")
    assert troubles == []
    told = shown()
    assert "tiny v1, champion" in told
    assert judged[0] in told.splitlines()
    assert judged[0].startswith("tiny version 1, set in MLflow, stands: tiny version 1 is the champion, promoted. ")
    press_promote(store, store.add(2, GOOD - 1))
    (refused,) = settle_all(store.uri, store.home / "models")[0]
    assert [line for line in shown().splitlines() if "set in MLflow," in line] == [judged[0], refused]


def test_what_hinders_one_model_is_told_and_hinders_no_other(store: Registry) -> None:
    made = store.add(1, GOOD)
    store.add(2, GOOD, name="aaa")
    press_promote(store, made)
    client = connect(store.uri)
    connect(store.uri).set_registered_model_alias("aaa-candidates", CHAMPION, "1")
    experiment = client.get_experiment_by_name("aaa")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    judged, (trouble,) = settle_all(store.uri, store.home / "models")
    assert len(judged) == 1
    assert "experiment aaa" in trouble
    (trouble,) = settle_all("sqlite:///relative.db", store.home)[1]
    assert "names no absolute path" in trouble


def test_two_who_judge_at_once_and_one_who_promotes_end_in_one_state(store: Registry) -> None:
    """The promoter and `relex serve` notice the same wish, while somebody promotes another."""
    store.add(1, GOOD)
    store.promote()
    press_promote(store, store.add(2, BETTER))
    store.add(3, BEST)
    start = threading.Barrier(3)
    told: list[str] = []

    def at_once(work: Callable[[], list[Promotion]]) -> None:
        start.wait()
        told.extend(each.entry.verdict for each in work())

    works: list[Callable[[], list[Promotion]]] = [store.settle, store.settle, lambda: [store.promote(3)]]
    threads = [threading.Thread(target=at_once, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Whoever came first has judged the wish.
    assert [verdict for verdict, *_ in store.trail()] == ["promoted"] * 3
    assert (store.champion(), alias(store), store.settle()) == (3, 3, [])
    assert set(told) == {"promoted"}
    assert [entry.number for entry in champions.history("tiny", tracking_uri=store.uri)] == [1, 2, 3]


def test_a_command_comes_after_what_was_set_in_mlflow_before(store: Registry) -> None:
    for number, solved in ((1, GOOD), (2, BETTER), (3, BEST)):
        made = store.add(number, solved)
    store.promote(1)
    press_promote(store, made)
    with pytest.raises(PromotionError, match="version 2 is not promoted"):
        store.promote(2)
    assert store.champion() == 2
    assert store.rollback().entry.to_version == 1
