"""What MLflow's pages say of a decision: what the model is, what it beat by how much, on which problems."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from deploy import champions, registry
from deploy.tracking import connect, prepare
from evaluation.benchmarks.benchmark import resolve_benchmark, write_benchmark
from flows.decide.record import chosen_by, datasets, describe, metrics, record, tags
from flows.settings import Settings
from flows.state.decision import Decision, Model, Score
from tests.helpers.gates import GATE
from tests.helpers.predictions import write_prediction

_NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all, since setting one up takes seconds."""
    return prepare(tmp_path_factory.mktemp("mlflow")).tracking_uri


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    problems = [{"prompt": f"{number} ", "answer": str(number)} for number in range(3)]
    named = {
        split: str(write_benchmark(tmp_path, split, problems, max_new_tokens=2)) for split in ("selection", "gate")
    }
    return Settings(
        training_run="tiny",
        checkpoints="/runs/tiny",
        base="/models/base",
        window=48,
        targets=[240],
        registered_model=f"tiny-{next(_NUMBERS)}",
        report=[str(write_benchmark(tmp_path, "report", problems, max_new_tokens=2)), str(tmp_path / "gone.yaml")],
        state=tmp_path / "state",
        **named,
    )


def decision(directory: Path) -> Decision:
    winner = Model("candidate", 240, str(directory), "relex", "abc")
    observed = Model("observed", 48, "seen")
    return Decision(
        "tiny",
        "0123",
        48,
        (8, 48),
        "registered",
        GATE.sentence,
        selection=(Score(observed, "selection", 0.41, 0.02, 500), Score(winner, "selection", 0.72, 0.02, 500)),
        report=(Score(observed, "report", 0.4, 0.02, 500), Score(winner, "report", 0.7, 0.02, 500)),
        gates=(GATE,),
        winner=winner,
        page_url="http://127.0.0.1:4200/runs/flow-run/1",
    )


def test_a_run_says_what_it_is_and_its_numbers_say_on_what_they_were_measured(
    settings: Settings, tmp_path: Path, uri: str
) -> None:
    made = decision(tmp_path)
    run = connect(uri).get_run(record(settings, made, tracking_uri=uri).run_id)
    note = run.data.tags["mlflow.note.content"]
    for piece in (GATE.sentence, "`/runs/tiny`", "`/models/base`", "steps 8 to 48", "step 240", made.page_url):
        assert piece in note, piece
    human = {"step": "240", "method": "relex", "accuracy": "0.7000", "verdict": "registered"}
    assert human.items() <= run.data.tags.items()
    assert run.data.tags["beat"] == "last observed @ 48 by +30.00 points"
    assert run.inputs is not None
    used = {each.dataset.name: each.dataset.digest for each in run.inputs.dataset_inputs}
    assert used == {name: resolve_benchmark(getattr(settings, name)).digest[:36] for name in ("selection", "gate")}
    # The candidate's own run has those of its own numbers.
    (below,) = connect(uri).search_runs(
        [run.info.experiment_id], filter_string=f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    )
    assert below.inputs is not None
    assert {each.dataset.name for each in below.inputs.dataset_inputs} == {"selection", "report"}
    assert "went to the gate" in below.data.tags["mlflow.note.content"]
    # A later call changes nothing, and fails at nothing.
    assert record(settings, replace(made, page_url=""), tracking_uri=uri).run_id == run.info.run_id


def test_guards_are_numbers_and_a_tag_of_a_decision(settings: Settings, tmp_path: Path, uri: str) -> None:
    problems = [{"prompt": f"{number}-", "answer": "0"} for number in range(3)]
    settings = settings.model_copy(
        update={"guards": {str(write_benchmark(tmp_path, "minus", problems, max_new_tokens=2)): 2.0}}
    )
    guard = replace(GATE, benchmark="minus", difference=-0.08, lower_bound=-0.1, verdict="worse", margin=0.02)
    made = replace(decision(tmp_path), verdict="refused", reason=guard.sentence, guards=(guard,))
    run = connect(uri).get_run(record(settings, made, tracking_uri=uri).run_id)
    assert run.data.metrics["guard/minus/difference"] == -0.08
    assert run.data.metrics["guard/minus/lower_bound"] == -0.1
    assert {"verdict": "refused", "guards": "minus: worse"}.items() <= run.data.tags.items()
    assert guard.sentence in run.data.tags["mlflow.note.content"]
    assert run.inputs is not None
    assert "minus" in {each.dataset.name for each in run.inputs.dataset_inputs}


def test_without_report_problems_the_curves_are_those_of_selection(
    settings: Settings, tmp_path: Path, uri: str
) -> None:
    made = replace(decision(tmp_path), report=())
    assert chosen_by(made) == {
        "observed on selection": {48: 0.41},
        "relex from step 48 on selection": {240: 0.72},
    }
    record(settings, made, tracking_uri=uri)
    experiment = connect(uri).get_experiment_by_name(settings.registered_model)
    assert experiment is not None
    named = {run.info.run_name: run for run in connect(uri).search_runs([experiment.experiment_id])}
    curve = connect(uri).get_metric_history(
        named["tiny relex from step 48 on selection"].info.run_id, "selection_accuracy"
    )
    assert [(point.step, point.value) for point in curve] == [(240, 0.72)]


def test_a_registered_version_and_what_is_promoted_of_it_say_what_they_are(
    settings: Settings, tmp_path: Path, uri: str
) -> None:
    directory = tmp_path / "prediction"
    write_prediction(directory, number=1)
    made = decision(directory)
    done = registry.register(
        directory,
        name=settings.registered_model,
        tracking_uri=uri,
        metrics=metrics(made),
        datasets=datasets(settings),
        tags=tags(made),
        description=describe(settings, made),
    )
    client = connect(uri)
    version = client.get_model_version(done.name, str(done.version))
    assert version.description == describe(settings, made)
    assert version.tags.items() >= tags(made).items()
    assert "promoted" in client.get_registered_model(done.name).description
    logged = client.get_logged_model(done.logged_model_id)
    assert logged.metrics is not None
    assert {each.dataset_name for each in logged.metrics if each.key == "gate_accuracy"} == {"gate"}
    name = settings.registered_model
    number = champions._copy(client, name, champions.find_candidate(client, name, None), number=1)
    assert client.get_model_version(name, str(number)).description == version.description
    assert f"{name}-candidates" in client.get_registered_model(name).description
