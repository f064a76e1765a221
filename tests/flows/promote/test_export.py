"""relex export: the champion as the Hub wants it, from a real prediction in a real MLflow store."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, constants

from deploy import registry
from deploy.tracking import prepare
from flows.errors import ExportError
from flows.promote.export import export, write_card
from relex.extrapolation import extrapolate_run
from relex.output import manifest
from relex.predictors import parse_method
from tests.helpers import cli, hub_server
from tests.helpers.registry import BEST, OBSERVED, PROBLEMS, Registry
from tests.helpers.straight_run import make_old, write_checkpoint


@pytest.fixture
def store(tmp_path: Path) -> Registry:
    """A store whose champion is a prediction for step 240."""
    for step in (0, 10, 20, 25, 40):
        directory = write_checkpoint(tmp_path, step)
        (directory / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
        make_old(directory)
    run, base = tmp_path / "run", tmp_path / "base"
    extrapolate_run(
        run,
        base,
        targets=[240],
        out=tmp_path / "out",
        method=parse_method("secant"),
        memory=1 << 26,
        threads=1,
        grams=tmp_path / "grams",
        staging=tmp_path / "staging",
    )
    (tmp_path / "out" / "step-240").rename(tmp_path / "prediction-1")
    made = Registry(tmp_path, prepare(tmp_path / "mlflow").tracking_uri)
    made.add(1, BEST)
    return made


def test_the_card_says_what_it_is_and_the_hub_reads_its_results(
    store: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    promoted = store.promote()
    before = manifest.read(store.home / "prediction-1").files
    out = store.home / "published"
    status, said, _ = cli.relex(capsys, "export", "tiny", "--out", out, "--home", store.home)
    assert (status, "".join(said.split())) == (0, f"wrote{out}:{out}/README.md")
    card = ModelCard.load(out / "README.md")
    head: Any = card.data
    (result,) = head.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ("digits-gate", "exact_match", 0.8)
    assert head.tags == ["relex", "rlvr", "weight-extrapolation"]
    # A directory of this machine is not a model of the Hub's.
    assert head.base_model is None
    for told in ("training step 240", "`secant", "4 checkpoints, steps 10 to 40", promoted.entry.reason):
        assert told in card.text
    assert f"| last observed @ 48 | {OBSERVED / PROBLEMS:.4f} | 40 | digits-gate |" in card.text
    # What is uploaded is what was registered, and what was registered is what it was.
    assert manifest.read(out).files == before
    assert all((out / name).read_bytes() == (store.home / "prediction-1" / name).read_bytes() for name in before)
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    weights = registry.verified(champion, tracking_uri=store.uri, downloads=store.home)
    assert not (weights / "README.md").exists()


def test_a_base_on_the_hub_is_named_to_it(store: Registry) -> None:
    store.promote()
    made = replace(manifest.read(store.home / "prediction-1"), base="hf://org/base@0123")
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    card = ModelCard(write_card("tiny", champion, made, tracking_uri=store.uri))
    head: Any = card.data
    assert head.base_model == "org/base"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[hub_server.Hub]:
    with hub_server.serve() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # This server has no chunked storage.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
        yield running


def test_to_the_hub_it_goes_in_one_commit_that_replaces_the_weights_that_were_there(
    store: Registry, hub: hub_server.Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    store.promote()
    former = {"model-00001-of-00002.safetensors": b"old", "LICENSE": b"mine"}
    hub.make("org/tiny").commit(former)
    for name, access in (("tiny", "public"), ("new", "private")):
        status, said, error = cli.relex(capsys, "export", "tiny", "--out", f"hf://org/{name}", "--home", store.home)
        assert status == 0, error
        repository = hub.repositories[f"org/{name}"]
        sha = repository.branches["main"]
        assert f"{hub.url}/org/{name}/commit/{sha}" in "".join(said.split())
        assert repository.access == access
        files = repository.commits[sha]
        made = manifest.read(store.home / "prediction-1")
        added = {*made.files, "relex.json", "README.md"}
        assert files.keys() - added == ({"LICENSE"} if name == "tiny" else {".gitattributes"})
        for each in made.files:
            assert files[each] == (store.home / "prediction-1" / each).read_bytes()
        head: Any = ModelCard(files["README.md"].decode()).data
        assert head.eval_results[0].metric_value == 0.8


def test_a_hub_that_lets_nobody_in_is_told_in_one_line(
    store: Registry, hub: hub_server.Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.promote()
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(ExportError, match=r"hf://org/tiny was not written \(HTTP 401\): .* hf auth login"):
        export("tiny", "hf://org/tiny", tracking_uri=store.uri, downloads=store.home)
    assert hub.repositories == {}


def test_the_card_of_a_real_checkpoint_speaks_of_no_prediction(store: Registry) -> None:
    store.promote()
    made = manifest.read(store.home / "prediction-1")
    made = replace(made, forecast=replace(made.forecast, method="observed"))
    champion = registry.champion("tiny", tracking_uri=store.uri)
    assert champion is not None
    card = ModelCard(write_card("tiny", champion, made, tracking_uri=store.uri))
    head: Any = card.data
    assert head.tags == ["relex", "rlvr"]
    assert "predict" not in card.text
    assert "Training step 240 of a reinforcement learning run" in card.text


def test_without_a_champion_or_a_place_nothing_is_written(store: Registry) -> None:
    def refused(name: str, out: Path | str) -> str:
        with pytest.raises(ExportError) as error:
            export(name, str(out), tracking_uri=store.uri, downloads=store.home)
        return str(error.value)

    out = store.home / "published"
    assert refused("tiny", out) == "tiny has no champion. Promote a candidate: relex promote tiny."
    assert refused("tine", out).endswith("Did you mean tiny?")
    store.promote()
    assert "is there already" in refused("tiny", store.home)
    assert refused("tiny", "hf://tiny") == "hf://tiny is not written as hf://ORG/NAME."
    assert not out.exists()
