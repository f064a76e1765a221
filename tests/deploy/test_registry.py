import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.candidate import verify
from deploy.champions import Clearance, settle
from deploy.errors import CandidateError, DigestConflictError, RegistryError
from deploy.registry import CHAMPION, Registered, champion, models, register
from deploy.tracking import LocalStore, connect


def _register(model: Path, store: LocalStore) -> Registered:
    return register(model, name="tiny", tracking_uri=store.tracking_uri)


def test_importing_the_package_does_not_import_mlflow() -> None:
    program = "import sys, deploy.registry, deploy.runs, deploy.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_registered_version_shares_every_file_with_the_prediction(model: Path, store: LocalStore) -> None:
    made = _register(model, store)
    assert (made.name, made.version, made.created) == ("tiny-candidates", 1, True)
    for name in verify(model).files:
        assert (made.weights / name).samefile(model / name)
    assert (made.weights.parent / "components/tokenizer/tokenizer.json").samefile(model / "tokenizer.json")
    assert verify(made.weights).digest == made.digest


def test_a_registered_version_loads_the_three_ways_people_load_models(model: Path, store: LocalStore) -> None:
    import mlflow.pyfunc
    import mlflow.transformers
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = _register(model, store)
    plain = AutoModelForCausalLM.from_pretrained(made.weights)
    assert AutoTokenizer.from_pretrained(made.weights).decode([3, 12, 4]) == "1+2"
    mlflow.set_tracking_uri(store.tracking_uri)
    try:
        pipeline = mlflow.transformers.load_model(made.model_uri)
        function = mlflow.pyfunc.load_model(made.model_uri)
    finally:
        mlflow.set_tracking_uri("")
    for name, tensor in plain.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, pipeline.model.state_dict()[name])
    assert pipeline("1+2=", max_new_tokens=2)[0]["generated_text"].startswith("1+2=")
    assert function.metadata.model_id == made.logged_model_id


def test_the_same_digest_twice_is_one_version(model: Path, store: LocalStore) -> None:
    first = _register(model, store)
    again = _register(shutil.copytree(model, model.with_name("predicted-again")), store)
    assert (again.version, again.logged_model_id, again.created) == (1, first.logged_model_id, False)
    assert len(models("tiny", tracking_uri=store.tracking_uri)) == 1


def test_a_digest_that_comes_with_other_bytes_is_refused(model: Path, store: LocalStore) -> None:
    made = _register(model, store)
    before = {path: path.stat().st_mtime_ns for path in made.weights.parent.rglob("*")}
    other = shutil.copytree(model, model.with_name("other"))
    manifest = json.loads((other / "relex.json").read_text())
    (other / "chat_template.jinja").write_text("")
    empty = {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}
    manifest["files"]["chat_template.jinja"] = empty
    (other / "relex.json").write_text(json.dumps(manifest))
    with pytest.raises(DigestConflictError, match=r"registered already and chat_template\.jinja differs: None there"):
        _register(other, store)
    assert before == {path: path.stat().st_mtime_ns for path in made.weights.parent.rglob("*")}


def test_registering_again_puts_damaged_registered_files_right(model: Path, store: LocalStore) -> None:
    made = _register(model, store)
    (made.weights / "model.safetensors").unlink()
    (made.weights / "tokenizer.json").unlink()
    (made.weights / "tokenizer.json").write_text("{}")
    with pytest.raises(CandidateError):
        verify(made.weights)
    assert not _register(model, store).created
    assert verify(made.weights).digest == made.digest


def test_a_refused_directory_leaves_no_trace_in_the_store(model: Path, store: LocalStore) -> None:
    (model / "model.safetensors").write_bytes(b"")
    with pytest.raises(CandidateError):
        _register(model, store)
    assert models("tiny", tracking_uri=store.tracking_uri) == []
    assert list(store.artifacts.rglob("*")) == []


@pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or Path("/dev/shm").stat().st_dev == Path("/tmp").stat().st_dev,
    reason="needs a second file system",
)
def test_where_links_cannot_be_made_the_files_are_copied_once(
    model: Path, store: LocalStore, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = Path("/dev/shm") / tmp_path_factory.mktemp("elsewhere").name
    far = shutil.copytree(model, elsewhere / "step-240")
    try:
        made = _register(far, store)
        copied = {path: path.stat().st_ino for path in made.weights.iterdir()}
        assert far.stat().st_dev != made.weights.stat().st_dev
        assert not _register(far, store).created
        assert copied == {path: path.stat().st_ino for path in made.weights.iterdir()}
        assert verify(made.weights).digest == made.digest
    finally:
        shutil.rmtree(elsewhere)


def test_the_registry_lists_what_was_registered_with_its_tags_and_metrics(model: Path, store: LocalStore) -> None:
    figure = model.parent / "figure.png"
    figure.write_bytes(b"\x89PNG")
    made = register(
        model,
        name="tiny",
        tracking_uri=store.tracking_uri,
        metrics={"accuracy": 0.75},
        tags={"verdict": "registered"},
        artifacts=[figure],
    )
    (row,) = models("tiny", tracking_uri=store.tracking_uri)
    assert (row.version, row.digest, row.target_step, row.champion) == (1, made.digest, 240, False)
    assert (row.tags, row.metrics, row.weights) == ({"verdict": "registered"}, {"accuracy": 0.75}, str(made.weights))
    assert [file.path for file in connect(store.tracking_uri).list_artifacts(made.run_id)] == ["figure.png"]


def test_a_champion_is_the_copy_that_was_judged_and_marks_its_candidate(model: Path, store: LocalStore) -> None:
    made = _register(model, store)
    client = connect(store.tracking_uri)
    promoted = client.copy_model_version(made.model_uri, "tiny")
    client.set_registered_model_alias("tiny", CHAMPION, str(promoted.version))
    assert champion("tiny", tracking_uri=store.tracking_uri) is None
    settle(
        "tiny",
        tracking_uri=store.tracking_uri,
        judge=lambda candidate, champion: Clearance(passed=True, reason="", metrics={}),
        downloads=store.artifacts,
    )
    row = champion("tiny", tracking_uri=store.tracking_uri)
    assert row is not None
    assert (row.name, row.digest, row.weights) == ("tiny", made.digest, str(made.weights))
    assert [row.champion for row in models("tiny", tracking_uri=store.tracking_uri)] == [True]


@pytest.mark.parametrize(
    ("tracking_uri", "name", "says"),
    [
        ("sqlite:///relative.db", "tiny", "names no absolute path"),
        ("file:///tmp/mlruns", "tiny", "is not a store MLflow serves"),
        (None, "a/b", "is no name for a model"),
        (None, "x' or '1'='1", "is no name for a model"),
    ],
)
def test_an_address_or_a_name_that_cannot_be_is_refused_in_one_line(
    model: Path, store: LocalStore, tracking_uri: str | None, name: str, says: str
) -> None:
    with pytest.raises(RegistryError) as refusal:
        register(model, name=name, tracking_uri=tracking_uri or store.tracking_uri)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_deleted_experiment_is_refused(model: Path, store: LocalStore) -> None:
    _register(model, store)
    client = connect(store.tracking_uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    client.delete_experiment(experiment.experiment_id)
    with pytest.raises(RegistryError, match=r"experiment tiny of .* is deleted"):
        _register(model, store)
