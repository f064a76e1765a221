"""Promotion, rollback and what `relex models` says, on a real MLflow store; the races go through a real server."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partialmethod
from pathlib import Path

import pytest
from mlflow import MlflowClient

from deploy import audit, champions, registry
from deploy.errors import CandidateError, NoSuchVersionError
from deploy.registry import CHAMPION
from deploy.tracking import connect
from deploy.versions import VERSIONS_TAG
from flows.decide.gate_results import write_gate_results
from flows.drift.flow import log_compared
from flows.drift.record import Compared, keep
from flows.errors import PromotionError
from flows.promote.versions import list_versions
from flows.settings import Settings
from flows.state.decision import Model
from flows.state.overtaken import Paired
from tests.helpers import ROOT, cli
from tests.helpers.mlflow_server import serve
from tests.helpers.predictions import write_prediction
from tests.helpers.registry import BEST, BETTER, GOOD, OBSERVED, PROBLEMS, Registry, report


def test_the_first_champion_is_no_worse_than_what_was_observed_and_the_next_is_better_than_it(store: Registry) -> None:
    store.add(1, GOOD)
    first = store.promote()
    assert (first.entry.verdict, first.entry.from_version, first.entry.to_version) == ("promoted", None, 1)
    assert "last observed @ 48 0.2000" in first.entry.reason
    # Neither was judged against the other: their own results are paired.
    store.add(2, BEST)
    second = store.promote()
    assert (second.entry.from_version, second.entry.to_version) == (1, 2)
    assert second.entry.metrics["gate_champion_difference"] == pytest.approx((BEST - GOOD) / PROBLEMS)
    assert "champion @ 240 0.4000" in second.entry.reason
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    assert (champion.version, champion.digest) == (2, store.digest(2))


def test_every_promotion_is_a_run_that_says_who_when_from_which_version_to_which(store: Registry) -> None:
    store.add(1, GOOD)
    done = store.promote(by="grace")
    run = connect(store.uri).get_run(done.entry.run_id)
    assert run.info.status == "FINISHED"
    said = {key: run.data.tags[key] for key in ("action", "verdict", "by", "from_version", "to_version", "candidate")}
    assert said == {
        "action": "promote",
        "verdict": "promoted",
        "by": "grace",
        "from_version": "",
        "to_version": "1",
        "candidate": "1",
    }
    assert run.data.metrics["gate_last_observed_lower_bound"] > 0
    assert done.entry.at_ms > 0


def test_promoting_the_champion_again_does_nothing(store: Registry) -> None:
    store.add(1, GOOD)
    assert store.promote() == store.promote()
    assert store.trail() == [("promoted", None, 1)]


def test_what_is_not_better_than_the_champion_is_refused_on_record_and_the_champion_stays(store: Registry) -> None:
    store.add(1, BETTER)
    store.promote()
    store.add(2, BETTER - 1)
    with pytest.raises(PromotionError, match=r"version 2 is not promoted.*not shown: the interval") as refusal:
        store.promote()
    assert "\n" not in str(refusal.value)
    assert store.champion() == 1
    assert store.trail() == [("promoted", None, 1), ("refused", 1, None)]


@pytest.mark.parametrize("change", [{"digest": "another"}, {"batch_size": 8}])
def test_results_that_cannot_be_paired_with_the_champions_are_refused_with_the_way_out(
    store: Registry, change: dict[str, str]
) -> None:
    store.add(1, GOOD)
    store.promote()
    store.add(2, BEST, **change)  # type: ignore[arg-type]
    with pytest.raises(PromotionError, match=r"cannot be compared with the champion.*promote what that registers"):
        store.promote()
    assert store.champion() == 1
    # A decision that scored the champion beside its candidate needs none of the champion's own results.
    store.add(3, BEST, against=[(1, GOOD)], **change)  # type: ignore[arg-type]
    assert store.promote().entry.to_version == 2


def test_a_name_that_is_not_registered_is_told_with_those_that_are(
    store: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    store.add(1, GOOD)

    def told(*arguments: str) -> str:
        status, out, error = cli.relex(capsys, *arguments, "--home", store.home)
        return f"{status} {out}{error}".strip()

    for command in ("promote", "rollback"):
        other = (
            "NoSuchVersionError: nothing is registered under that name (tine). Registered are tiny. Did you mean tiny?"
        )
        assert told(command, "tine") == f"1 relex: {other}"
        meant = "NoSuchVersionError: tiny-candidates holds the candidates of tiny: name tiny."
        assert told(command, "tiny-candidates") == f"1 relex: {meant}"
    assert told("models", "nosuch") == "0 nothing is registered under that name (nosuch). Registered are tiny."
    # Nothing was made of the name.
    assert connect(store.uri).get_experiment_by_name("tine") is None


def test_a_version_without_gate_results_is_refused(store: Registry) -> None:
    registry.register(write_prediction(store.home / "bare"), name="tiny", tracking_uri=store.uri)
    with pytest.raises(PromotionError, match="was registered without its gate results"):
        store.promote()
    assert store.champion() is None


def test_a_version_that_does_not_exist_is_refused_with_those_that_do(store: Registry) -> None:
    with pytest.raises(NoSuchVersionError, match=r"nothing is registered under that name \(tiny\), nor"):
        store.promote()
    store.add(1, GOOD)
    with pytest.raises(NoSuchVersionError, match="has no version 7: its versions are 1"):
        store.promote(7)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def forge(path: Path) -> None:
    """Change the weights and let the manifest agree."""
    import hashlib

    flip(path)
    manifest = path.with_name("relex.json")
    content = json.loads(manifest.read_text())
    content["files"][path.name]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.unlink()
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [flip, forge, Path.unlink])
def test_a_shard_that_changed_since_registration_is_noticed_before_promotion_and_before_serving(
    store: Registry, damage: Callable[[Path], None]
) -> None:
    store.add(1, GOOD)
    made = store.add(2, BEST)
    store.promote(1)
    damage(made.weights / "model.safetensors")
    with pytest.raises(PromotionError, match="is not what was registered"):
        store.promote(2)
    assert store.champion() == 1
    (row, _) = registry.models("tiny", tracking_uri=store.uri)
    with pytest.raises(CandidateError, match="is not what was registered"):
        registry.verified(row, tracking_uri=store.uri, downloads=store.home / "models")


def test_changed_gate_results_are_noticed(store: Registry) -> None:
    made = store.add(1, GOOD)
    (kept,) = (made.weights.parent / "gate").iterdir()
    kept.write_text(kept.read_text().replace("0.0", "1.0"))
    with pytest.raises(PromotionError, match=r"gate results .* changed"):
        store.promote()
    store.add(1, GOOD)
    assert store.promote().entry.verdict == "promoted"


def test_rollback_goes_back_along_the_trail_and_says_when_nothing_is_before(store: Registry) -> None:
    for number, solved in ((1, GOOD), (2, BETTER), (3, BEST)):
        store.add(number, solved)
        store.promote()
    assert store.rollback().entry.to_version == 2
    assert store.rollback().entry.to_version == 1
    with pytest.raises(NoSuchVersionError, match="tiny version 1 has no champion before it"):
        store.rollback()
    assert store.champion() == 1
    with pytest.raises(NoSuchVersionError, match="the newest, was champion and ada rolled it back"):
        store.promote()
    again = store.promote(3).entry
    # A prediction has one version, however often it is promoted.
    assert (again.from_version, again.to_version) == (1, 3)
    assert audit.rolled_back(champions.history("tiny", tracking_uri=store.uri), store.digest(3)) is None
    assert store.rollback().entry.to_version == 1
    assert [verdict for verdict, *_ in store.trail()] == ["promoted"] * 3 + ["rolled back"] * 2 + [
        "promoted",
        "rolled back",
    ]


def test_nothing_is_rolled_back_to_a_damaged_version(store: Registry) -> None:
    first = store.add(1, GOOD)
    store.promote()
    store.add(2, BEST)
    store.promote()
    flip(first.weights / "model.safetensors")
    with pytest.raises(CandidateError, match="tiny version 1 is not what was registered"):
        store.rollback()
    assert store.champion() == 2


def test_a_decision_that_is_registered_again_does_not_come_after_a_later_one(store: Registry) -> None:
    for batch_size in (64, 8, 64):
        made = store.add(1, GOOD, batch_size=batch_size)
    (row,) = registry.models("tiny", tracking_uri=store.uri)
    reports = map(json.loads, registry.gate_reports(row, tracking_uri=store.uri))
    assert [each["candidate"]["report"]["settings"]["batch_size"] for each in reports] == [64, 8]
    logged = connect(store.uri).get_logged_model(made.logged_model_id)
    assert json.loads(logged.tags[VERSIONS_TAG]) == [{"name": "tiny-candidates", "version": 1}]


def test_a_store_that_answers_in_pages_is_read_to_the_last(store: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, solved in ((1, GOOD), (2, BEST)):
        store.add(number, solved)
        store.promote()
        store.add(number, solved, name=f"other-{number}")
    for search in ("search_registered_models", "search_model_versions", "search_runs"):
        monkeypatch.setattr(MlflowClient, search, partialmethod(getattr(MlflowClient, search), max_results=1))
    assert registry.names(tracking_uri=store.uri) == ["other-1", "other-2", "tiny"]
    assert [row.version for row in registry.models("tiny", tracking_uri=store.uri)] == [2, 1]
    assert store.trail() == [("promoted", None, 1), ("promoted", 1, 2)]


def test_a_name_without_champion_cannot_be_rolled_back(store: Registry) -> None:
    store.add(1, GOOD)
    with pytest.raises(NoSuchVersionError, match="tiny has no champion to go back from"):
        store.rollback()


def test_the_listing_tells_versions_champion_numbers_and_whether_the_weights_are_whole(store: Registry) -> None:
    store.add(1, GOOD)
    store.promote()
    second = store.add(2, BEST)
    store.promote()
    flip(second.weights / "model.safetensors")

    def states(contents: str) -> list[tuple[int, int | None, str]]:
        listing = list_versions("tiny", tracking_uri=store.uri, downloads=store.home, contents=contents)  # type: ignore[arg-type]
        assert listing.champion == 2
        return [(each.row.version, each.promoted, each.state.split(":")[0]) for each in listing.versions]

    assert states("sizes") == [(2, 2, "sizes match"), (1, 1, "sizes match")]
    assert states("read") == [(2, 2, "damaged"), (1, 1, "verified")]
    assert registry.names(tracking_uri=store.uri) == ["tiny"]


def test_the_command_line_promotes_lists_and_rolls_back(
    store: Registry, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def relex(*arguments: str) -> str:
        status, out, error = cli.relex(capsys, *arguments, "--home", store.home)
        return f"{status} {out}{error}"

    store.add(1, GOOD)
    store.add(2, BEST)
    assert "tiny version 1 (prediction" in relex("promote", "tiny", "1")
    assert json.loads(relex("promote", "tiny", "--json").removeprefix("0 "))["from_version"] == 1
    told = relex("models")
    assert "tiny-candidates" in told
    assert "tiny v2, champion" in told
    assert "sizes match" in told
    assert relex("rollback", "tiny").startswith("0 tiny version 1")
    assert relex("rollback", "tiny").startswith("1 relex: NoSuchVersionError: tiny version 1 has no champion before")
    (printed,) = json.loads(relex("models", "tiny", "--verify", "--json").removeprefix("0 "))
    assert [each["state"] for each in printed["versions"]] == ["verified", "verified"]
    assert printed["champion"] == 1


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    home = tmp_path_factory.mktemp("served")
    with serve(home) as uri:
        yield Registry(home, uri)


def run_promoter(store: Registry, version: int, name: str, start: threading.Barrier, refused: list[int]) -> None:
    start.wait()
    try:
        store.promote(version, name=name)
    except PromotionError:
        refused.append(version)


# The server costs half a second of CPU a promotion.
@pytest.mark.parametrize(
    ("where", "races"),
    [
        ("store", 10),
        pytest.param("served", 10, marks=pytest.mark.slow),
        pytest.param("store", int(os.environ.get("RELEX_RACES", "20")), marks=pytest.mark.slow),
    ],
)
def test_two_promoters_at_once_never_leave_the_worse_champion(
    where: str, races: int, request: pytest.FixtureRequest
) -> None:
    store = request.getfixturevalue(where)
    client = connect(store.uri)
    first_past: set[tuple[int, ...]] = set()
    race = 0
    # Both orders happen, sooner or later.
    while race < races or (first_past != {(), (2,)} and race < 20 * races):
        # Otherwise the trail alone would slow the last ones down.
        name = f"raced-{race // 20}"
        if race % 20 == 0:
            for number, solved in ((1, GOOD), (2, BETTER), (3, BEST)):
                store.add(number, solved, name=name)
            store.promote(1, name=name)
        client.set_registered_model_alias(name, CHAMPION, "1")
        start = threading.Barrier(2)
        refused: list[int] = []
        promoters = [
            threading.Thread(target=run_promoter, args=(store, version, name, start, refused)) for version in (2, 3)
        ]
        for promoter in promoters:
            promoter.start()
        while any(promoter.is_alive() for promoter in promoters):
            assert store.champion(name) is not None
            promoters[0].join(0.2)
            promoters[1].join(0.2)
        champion = registry.champion(name, tracking_uri=store.uri)
        assert champion is not None
        assert champion.digest == store.digest(3)
        assert refused in ([], [2])
        first_past.add(tuple(refused))
        race += 1
    assert first_past == {(), (2,)}


@pytest.mark.slow
def test_a_process_killed_at_any_step_leaves_a_champion_and_nothing_unfinished(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.flows.promote.dying_promote", str(tmp_path)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert all(kills >= 4 for kills in json.loads(ran.stdout).values()), ran.stdout


def test_a_version_that_the_run_has_overtaken_is_tagged_and_told(
    store: Registry, settings: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    store.add(1, GOOD)
    store.promote()
    store.add(2, GOOD)
    pair = Paired("gate", 400, 0.5, 0.744, -0.244, -0.29, -0.2)
    rows = [
        Compared("key", 40, method, 100, 130, None, registered, "accuracy", None, accuracies=(pair,))
        for method, registered in (("relex", "tiny-candidates version 1"), ("expo", ""))
    ]
    for row in rows:
        keep(settings, row)
    log_compared(settings, store.uri)
    told = "real step 130 by 24.4 points on gate"
    newer, beaten = list_versions("tiny", tracking_uri=store.uri, downloads=store.home).versions
    assert (beaten.overtaken, newer.overtaken) == (told, "")
    assert connect(store.uri).get_model_version("tiny", "1").tags["overtaken"] == told
    status, out, _ = cli.relex(capsys, "models", "tiny", "--home", store.home)
    assert status == 0
    assert f"v1 is overtaken: {told}" in out
    # A version that is gone since is no failure.
    connect(store.uri).delete_model_version("tiny-candidates", "1")
    log_compared(settings, store.uri)


def test_a_real_checkpoint_of_a_run_without_a_decision_has_to_beat_the_base_by_whatever_margin(store: Registry) -> None:
    for number, solved in ((1, OBSERVED), (2, BEST)):
        path = write_prediction(store.home / f"prediction-{number}", number=number)
        results = write_gate_results(
            store.home / f"gate-{number}.json",
            (Model("candidate", 240, str(path), "observed", store.digest(number)), report(solved)),
            [(Model("base", 0, "there"), report(OBSERVED))],
            margin=0.9,
            confidence=0.95,
        )
        registry.register(path, name="tiny", tracking_uri=store.uri, gate_reports=[results])
    with pytest.raises(PromotionError, match=r"base @ 0 0\.2000.*not shown"):
        store.promote(1)
    assert store.promote(2).entry.metrics["gate_base_lower_bound"] > 0
