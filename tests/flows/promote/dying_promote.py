"""Promotes, rolls back, judges, registers in child processes that kill themselves at every step; run by test_promote.

    python -m tests.flows.promote.dying_promote HOME    prints how often each was killed, as JSON

After each kill the champion is the one before or the one after, and the same work done again, or other work in its
place, leaves nothing unfinished. The parent never opens the store: a database connection does not survive a fork.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from deploy import champions, registry
from deploy.registry import CHAMPION
from deploy.tracking import connect, prepare
from deploy.wishes import ANSWER
from tests.deploy.dying_register import child, watch
from tests.helpers.predictions import write_prediction
from tests.helpers.registry import BEST, BETTER, GOOD, Registry

Work = Callable[[Registry], object]


def _die(store: Registry, work: Work, last: int) -> bool:
    """Do the work in a child that is killed before its step `last`; returns False when it has no more steps."""
    left = last

    def step() -> None:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1

    def run() -> None:
        watch(step)
        work(store)

    status = child(run)
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


def _at_every_step(store: Registry, *, work: Work, after: Work, stride: int = 1) -> int:
    """Kill the work at every step; `after` asserts and makes ready for the next. Returns how often it was killed."""
    kills = 0
    while _die(store, work, kills * stride):
        assert child(lambda: _do(store, after)) == 0, f"killed before step {kills * stride}"
        kills += 1
    return kills


def _do(store: Registry, work: Work) -> None:
    work(store)


def _reset(store: Registry) -> None:
    """Make version 1 the champion, as if version 3 had never been promoted."""
    client = connect(store.uri)
    client.set_registered_model_alias("tiny", CHAMPION, "1")
    for version in client.search_model_versions("name = 'tiny'"):
        if version.tags["relex.digest"] == store.digest(3):
            client.delete_model_version("tiny", str(version.version))


def _promoted(store: Registry) -> None:
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    assert champion.digest in (store.digest(1), store.digest(3))
    store.promote(3)
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    assert champion.digest == store.digest(3)
    _nothing_unfinished(store)
    # The audit trail leads from the champion before to the one there is, however often it was begun.
    moved = [entry for entry in champions.history("tiny", tracking_uri=store.uri) if entry.moved]
    assert (moved[-1].from_version, moved[-1].to_version) == (1, champion.version)
    _reset(store)


def _rolled_back(store: Registry) -> None:
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    assert champion.digest in (store.digest(1), store.digest(2))
    if champion.digest == store.digest(2):
        store.rollback()
    store.promote(2)
    # Not twice, also where it was killed after the alias had moved.
    trail = [entry.verdict for entry in champions.history("tiny", tracking_uri=store.uri) if entry.moved]
    assert trail[-3:] == ["promoted", "rolled back", "promoted"]
    _nothing_unfinished(store)


def _judged(store: Registry) -> None:
    """Candidate 3 was given the alias by hand, and stands."""
    assert store.champion() is not None
    store.settle()
    client = connect(store.uri)
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    assert champion.digest == store.digest(3)
    _answered(store, "tiny-candidates", 3, verdict="stands")
    assert CHAMPION not in client.get_registered_model("tiny-candidates").aliases
    assert int(client.get_registered_model("tiny").aliases[CHAMPION]) == champion.version
    moved = [entry for entry in champions.history("tiny", tracking_uri=store.uri) if entry.moved]
    assert (moved[-1].asked, moved[-1].to_version) == ("tiny-candidates/3", champion.version)
    _nothing_unfinished(store)
    _wish(store)


def _wish(store: Registry) -> None:
    _reset(store)
    store.settle()
    connect(store.uri).set_registered_model_alias("tiny-candidates", CHAMPION, "3")


def _given_back(store: Registry) -> None:
    """The copy of a worse candidate was given the alias by hand, and is refused."""
    client = connect(store.uri)
    assert store.champion() == 1
    store.settle()
    assert store.champion() == 1
    assert int(client.get_registered_model("tiny").aliases[CHAMPION]) == 1
    (worse,) = (copy.version for copy in client.search_model_versions("name = 'tiny'") if str(copy.version) != "1")
    _answered(store, "tiny", int(worse), verdict="refused")
    assert store.settle() == []
    client.set_registered_model_alias("tiny", CHAMPION, str(worse))


def _answered(store: Registry, model: str, version: int, *, verdict: str) -> None:
    judged = connect(store.uri).get_model_version(model, str(version))
    assert judged.tags[ANSWER] == verdict
    assert judged.description is not None
    assert judged.description.count("**Set in MLflow") == 1
    entry = [entry for entry in champions.history("tiny", tracking_uri=store.uri) if entry.asked][-1]
    assert (entry.asked, entry.finished) == (f"{model}/{version}", True)
    assert entry.verdict == ("refused" if verdict == "refused" else "promoted")


def _unused(store: Registry) -> int:
    return len(list(store.home.glob("prediction-*"))) + 1


def _other(store: Registry) -> None:
    store.add(_unused(store), GOOD)
    _nothing_unfinished(store)
    versions = registry.models("tiny", tracking_uri=store.uri)
    root = store.home / "mlflow/artifacts/tiny/models"
    assert {path.name for path in root.iterdir()} == {row.logged_model_id for row in versions}


def _nothing_unfinished(store: Registry) -> None:
    client = connect(store.uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    assert {model.status for model in client.search_logged_models([experiment.experiment_id])} == {"READY"}
    assert list(store.home.rglob(".*.partial")) == []
    digests = [version.tags["relex.digest"] for version in client.search_model_versions("name = 'tiny'")]
    assert len(digests) == len(set(digests))
    known = {entry.to_version for entry in champions.history("tiny", tracking_uri=store.uri) if entry.moved}
    assert {version.version for version in client.search_model_versions("name = 'tiny'")} <= known


def main(home: Path) -> None:
    # Imports everything once, before the forks.
    warm = Registry(home / "warm", prepare(home / "warm" / "mlflow").tracking_uri)
    warm.add(1, GOOD)
    warm.promote()
    assert threading.active_count() == 1
    (home / "mlflow").mkdir()
    store = Registry(home, f"sqlite:///{home}/mlflow/mlflow.db")
    for number in (1, 2, 3):
        write_prediction(home / f"prediction-{number}", number=number)

    def fill(store: Registry) -> None:
        for number, solved in ((1, GOOD), (2, BETTER), (3, BEST)):
            store.add(number, solved)
        store.promote(1)

    def make_second(store: Registry) -> None:
        _reset(store)
        store.promote(2)

    def make_first(store: Registry) -> None:
        store.settle()
        client = connect(store.uri)
        for copy in client.search_model_versions("name = 'tiny'"):
            if str(copy.version) != "1":
                client.delete_model_version("tiny", str(copy.version))

    assert child(lambda: fill(store)) == 0
    kills = {"promote": _at_every_step(store, work=lambda one: one.promote(3), after=_promoted)}
    assert child(lambda: make_second(store)) == 0
    kills["rollback"] = _at_every_step(store, work=lambda one: one.rollback(), after=_rolled_back, stride=2)
    assert child(lambda: _wish(store)) == 0
    kills["set in MLflow"] = _at_every_step(store, work=lambda one: one.settle(), after=_judged)

    def refuse(store: Registry) -> None:
        store.settle()
        store.add(4, GOOD - 1)
        client = connect(store.uri)
        client.set_registered_model_alias("tiny", CHAMPION, "1")
        make_first(store)
        copied = client.copy_model_version("models:/tiny-candidates/4", "tiny")
        client.set_registered_model_alias("tiny", CHAMPION, str(copied.version))

    assert child(lambda: refuse(store)) == 0
    kills["refused"] = _at_every_step(store, work=lambda one: one.settle(), after=_given_back)
    assert child(lambda: make_first(store)) == 0
    kills["register"] = _at_every_step(store, work=lambda one: one.add(_unused(one), GOOD), after=_other, stride=6)
    sys.stdout.write(json.dumps(kills))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
