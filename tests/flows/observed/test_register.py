"""Real checkpoints through the gate into a real MLflow store, by the answers of a tiny model."""

from pathlib import Path

import pytest

from deploy import registry
from deploy.tracking import connect, prepare
from evaluation.verdict.looks import read_looks
from flows.errors import ObservedError
from flows.observed.register import reference, register
from flows.promote.promotion import promote
from flows.settings import Settings
from flows.state.windows import decision_path
from relex.output import manifest
from tests.helpers import cli
from tests.helpers.decided_run import KEY, write_decided


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    # Random models answer nothing right: no worse, by any margin that is above 0.
    return write_decided(tmp_path, margin=0.9)


@pytest.mark.slow
def test_a_real_checkpoint_is_gated_registered_promoted_and_verified(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = prepare(tmp_path / "mlflow").tracking_uri
    config, checkpoint = tmp_path / "relex.yaml", tmp_path / "run" / "checkpoint-100"
    status, out, error = cli.relex(capsys, "register", checkpoint, "--config", config, "--home", tmp_path)
    assert status == 0, error
    said = " ".join(out.split())
    for told in (
        "Real step 100 is registered as tiny-candidates version 1.",
        "observed @ 100 scores 0.0000 and last observed @ 25 0.0000",
        "relex promote tiny 1 makes it the champion.",
    ):
        assert told in said
    (row,) = registry.models("tiny", tracking_uri=uri)
    assert (row.target_step, row.tags["method"], row.tags["step"]) == (100, "observed", "100")
    logged = connect(uri).get_logged_model(row.logged_model_id)
    assert (logged.model_type, logged.params["method.name"]) == ("checkpoint", "observed")
    assert not (settings.home / "observed" / "step-100").exists()
    done = promote("tiny", None, tracking_uri=uri, by="ada", downloads=tmp_path / "models")
    assert done.entry.digest == row.digest
    weights = registry.verified(row, tracking_uri=uri, downloads=tmp_path / "models")
    made = manifest.verify(weights)
    assert (made.forecast.method, made.forecast.steps, made.forecast.target_step) == ("observed", (100,), 100)
    assert made.checkpoints == (str(checkpoint),)
    with pytest.raises(ObservedError, match="checkpoint-100 is the champion of tiny already"):
        register(settings, str(checkpoint), tracking_uri=uri)
    # An earlier one is no better than the champion, and that was a look too.
    with pytest.raises(ObservedError, match=r"checkpoint-10 is not registered.*champion @ 100 0\.0000"):
        register(settings, str(checkpoint.with_name("checkpoint-10")), tracking_uri=uri)
    assert [look.number for look in read_looks(settings.home / "looks.json").looks] == [1, 2]
    assert len(registry.models("tiny", tracking_uri=uri)) == 1


def test_it_is_compared_with_the_last_observed_of_the_newest_decision_and_without_one_with_the_base(
    settings: Settings,
) -> None:
    assert reference(settings, 100).title == "last observed @ 25"
    # Not with itself.
    assert reference(settings, 25).title == "base @ 0"
    decision_path(settings, KEY).unlink()
    assert reference(settings, 100).title == "base @ 0"


def test_what_is_no_checkpoint_of_the_run_is_refused(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run" / "checkpoint-10" / "model.safetensors").write_bytes(b"half")

    def refused(place: str) -> str:
        with pytest.raises(ObservedError) as error:
            register(settings, place, tracking_uri="sqlite:///nowhere.db")
        return str(error.value)

    assert refused("base").endswith("which has 3, checkpoint-10 to checkpoint-100.")
    # However it is written.
    monkeypatch.chdir(tmp_path / "run")
    for place in (str(tmp_path / "run" / "checkpoint-10"), "checkpoint-10", "../run/checkpoint-10/"):
        assert refused(place).startswith(f"{place} is not yet: ")
