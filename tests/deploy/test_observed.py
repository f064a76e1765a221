"""The best observed checkpoint in a real MLflow store: one version with the alias, and no files of former ones."""

from pathlib import Path

import pytest

from deploy import observed, registry
from deploy.observed import best_digest, keep_best
from deploy.tracking import LocalStore, connect, local_path
from tests.helpers.predictions import write_prediction


def test_a_better_one_takes_the_alias_and_the_place_of_the_former(tmp_path: Path, store: LocalStore) -> None:
    uri = store.tracking_uri
    client = connect(uri)
    directories = [write_prediction(tmp_path / f"step-{step}", number=step, step=step) for step in (20, 40, 75)]
    assert best_digest("tiny", tracking_uri=uri) is None

    def keep(number: int) -> Path:
        done = keep_best(
            directories[number], name="tiny", tracking_uri=uri, metrics={"selection_accuracy": 0.5}, tags={"step": "1"}
        )
        assert best_digest("tiny", tracking_uri=uri) == done.digest
        alias = client.get_model_version_by_alias("tiny-observed", "best-observed")
        versions = client.search_model_versions("name = 'tiny-observed'")
        assert [each.version for each in versions] == [alias.version]
        place = local_path(client.get_logged_model(done.logged_model_id).artifact_location)
        assert place is not None
        assert (place / "model" / "relex.json").is_file()
        return place

    first = keep(0)
    second = keep(1)
    assert not first.exists()
    # It is no candidate, until a gate has judged it.
    assert registry.models("tiny", tracking_uri=uri) == []
    assert registry.register(directories[1], name="tiny", tracking_uri=uri).version == 1
    keep(2)
    assert second.exists()
    (candidate,) = registry.models("tiny", tracking_uri=uri)
    registry.verified(candidate, tracking_uri=uri, downloads=tmp_path)
    # Again, and back to one that was there before.
    keep(2)
    keep(0)


def test_killed_before_the_former_was_removed_the_next_call_removes_it(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = store.tracking_uri
    first, second = (write_prediction(tmp_path / f"step-{step}", number=step, step=step) for step in (20, 40))
    keep_best(first, name="tiny", tracking_uri=uri, metrics={}, tags={})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(observed, "_forget", die)
        with pytest.raises(KeyboardInterrupt):
            keep_best(second, name="tiny", tracking_uri=uri, metrics={}, tags={})
    keep_best(second, name="tiny", tracking_uri=uri, metrics={}, tags={})
    assert len(connect(uri).search_model_versions("name = 'tiny-observed'")) == 1
