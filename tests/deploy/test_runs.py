from pathlib import Path

import pytest

from deploy.errors import RegistryError
from deploy.registry import register
from deploy.runs import Recorded, annotate, log_series, record
from deploy.tracking import LocalStore, connect


def _refuse(store: LocalStore, decision: Path) -> Recorded:
    return record(
        "tiny",
        tracking_uri=store.tracking_uri,
        key="window 10..75 target 240",
        title="step 240",
        parameters={"method": "low-rank-linear", "target_step": 240},
        metrics={"accuracy": 0.25},
        tags={"verdict": "refused", "reason": "worse than the last observed checkpoint"},
        artifacts=[decision],
    )


def test_a_refused_decision_is_recorded_once(store: LocalStore, tmp_path: Path) -> None:
    decision = tmp_path / "decision.json"
    decision.write_text("{}")
    first, again = _refuse(store, decision), _refuse(store, decision)
    assert first == again
    client = connect(store.tracking_uri)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"method": "low-rank-linear", "target_step": "240"}
    assert run.data.tags["verdict"] == "refused"
    assert [metric.value for metric in client.get_metric_history(first.run_id, "accuracy")] == [0.25]
    assert [file.path for file in client.list_artifacts(first.run_id)] == ["decision.json"]


def test_what_comes_of_a_decision_is_added_to_its_run(store: LocalStore, tmp_path: Path) -> None:
    decision = tmp_path / "decision.json"
    decision.write_text("{}")
    first = _refuse(store, decision)
    for _ in range(2):
        added = annotate(
            "tiny",
            tracking_uri=store.tracking_uri,
            key="window 10..75 target 240",
            title="step 240",
            metrics={"steps_saved": 425.0},
            tags={"stop": "stopped"},
        )
        assert added == first
    client = connect(store.tracking_uri)
    run = client.get_run(first.run_id)
    assert run.data.tags["stop"] == "stopped"
    assert run.data.tags["verdict"] == "refused"
    assert run.info.status == "FINISHED"
    assert [metric.value for metric in client.get_metric_history(first.run_id, "steps_saved")] == [425.0]


def test_a_decision_cut_short_is_completed_by_the_next_call(store: LocalStore, tmp_path: Path) -> None:
    missing = tmp_path / "decision.json"
    with pytest.raises(OSError, match=r"decision\.json"):
        _refuse(store, missing)
    missing.write_text("{}")
    recorded = _refuse(store, missing)
    client = connect(store.tracking_uri)
    assert len(client.search_runs([client.get_run(recorded.run_id).info.experiment_id])) == 1
    assert client.get_run(recorded.run_id).info.status == "FINISHED"


def test_a_registered_model_belongs_to_the_decision_it_comes_from(
    model: Path, store: LocalStore, tmp_path: Path
) -> None:
    decision = tmp_path / "decision.json"
    decision.write_text("{}")
    recorded = _refuse(store, decision)
    made = register(
        model, name="tiny", tracking_uri=store.tracking_uri, run_id=recorded.run_id, metrics={"accuracy": 0.25}
    )
    assert made.run_id == recorded.run_id
    client = connect(store.tracking_uri)
    assert client.get_model_version(made.name, str(made.version)).run_id == recorded.run_id
    assert [metric.value for metric in client.get_metric_history(made.run_id, "accuracy")] == [0.25]
    logged = client.get_logged_model(made.logged_model_id)
    assert [(metric.key, metric.value) for metric in logged.metrics or []] == [("accuracy", 0.25)]


def test_a_candidate_is_a_run_below_its_decision(store: LocalStore) -> None:
    decision = record("tiny", tracking_uri=store.tracking_uri, key="tiny 0123", title="window 75")
    key = "tiny 0123 relex-pinned:damping=0.3,rank=2 @ 200"
    below = record(
        "tiny",
        tracking_uri=store.tracking_uri,
        key=key,
        title="",
        parent=decision.run_id,
        parameters={"steps": "9" * 7000},
    )
    run = connect(store.tracking_uri).get_run(below.run_id)
    assert run.data.tags["mlflow.parentRunId"] == decision.run_id
    assert len(run.data.params["steps"]) == 6000


def test_a_curve_has_the_training_step_as_its_step_and_grows_without_repeating(store: LocalStore) -> None:
    points = {10: 0.1, 20: 0.2, 25: 0.4}
    log_series("tiny", points, tracking_uri=store.tracking_uri, series="real", metric="accuracy")
    more = {**points, 40: 0.3, 75: 0.6}
    run = log_series("tiny", more, tracking_uri=store.tracking_uri, series="real", metric="accuracy")
    history = connect(store.tracking_uri).get_metric_history(run.run_id, "accuracy")
    assert sorted((metric.step, metric.value) for metric in history) == sorted(more.items())


def test_a_curve_of_thousands_of_points_is_kept_whole(store: LocalStore) -> None:
    points = {step: step / 7 for step in range(2501)}
    run = log_series("tiny", points, tracking_uri=store.tracking_uri, series="long", metric="accuracy")
    assert len(connect(store.tracking_uri).get_metric_history(run.run_id, "accuracy")) == len(points)


def test_a_key_that_cannot_be_searched_for_is_refused(store: LocalStore) -> None:
    with pytest.raises(RegistryError, match="is no key for a run"):
        record("tiny", tracking_uri=store.tracking_uri, key="it's", title="")
