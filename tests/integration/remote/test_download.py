import itertools
from pathlib import Path

import pytest

from relex.errors import CheckpointChangedError, CheckpointError, UnreachableError
from relex.files import remote as remote_module
from relex.files.object_store import ObjectStore
from relex.formats.safetensors_header import read_header
from relex.output.download import local_model
from tests.helpers.buckets import Buckets, RemoteRun
from tests.helpers.hub_server import Hub, files
from tests.helpers.trajectories import Run, content, tree


def test_a_base_on_this_machine_is_used_where_it_lies(local: Run, tmp_path: Path) -> None:
    assert local_model(str(local.base), tmp_path / "copies") == local.base
    assert not (tmp_path / "copies").exists()


def test_a_base_in_a_bucket_is_copied_once(buckets: Buckets, remote: RemoteRun, local: Run, tmp_path: Path) -> None:
    buckets.put(f"{remote.base}/optimizer.pt", b"large")
    buckets.put(f"{remote.base}/tokenizer.json", b"{}")
    copy = local_model(remote.base, tmp_path / "copies")
    assert content(copy) == content(local.base) | {"tokenizer.json": b"{}"}
    before = copy.stat()
    assert local_model(remote.base, tmp_path / "copies") == copy
    assert copy.stat() == before


def test_a_base_on_the_hub_is_copied_by_its_commit(hub: Hub, local: Run, tmp_path: Path) -> None:
    repository = hub.make("org/base")
    repository.commit(files(local.base))
    first = local_model("hf://org/base", tmp_path / "copies")
    assert content(first) == content(local.base)
    repository.commit(files(local.run / "checkpoint-10"))
    second = local_model("hf://org/base", tmp_path / "copies")
    assert content(second) == content(local.run / "checkpoint-10")
    assert tree(tmp_path / "copies") == {second.name, *(f"{second.name}/{name}" for name in content(second))}


def test_a_copy_cut_off_anywhere_is_not_there(
    remote: RemoteRun, local: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, left = ObjectStore.fetch, 0

    def failing(self: ObjectStore, path: str, start: int, stop: int) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise UnreachableError("away")
        return fetch(self, path, start, stop)

    monkeypatch.setattr(ObjectStore, "fetch", failing)
    for limit in itertools.count():
        left = limit
        # What was asked before is remembered by the process.
        for cached in (remote_module._small_file, remote_module._opening, read_header):
            cached.cache_clear()
        try:
            copy = local_model(remote.base, tmp_path / "copies")
        except UnreachableError:
            assert not [path for path in tmp_path.glob("copies/*") if not path.name.startswith(".")]
        else:
            break
    assert limit == 4
    assert content(copy) == content(local.base)
    assert [path.name for path in (tmp_path / "copies").iterdir()] == [copy.name]


def test_a_base_that_changes_while_it_is_copied_is_not_used(
    buckets: Buckets, remote: RemoteRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = f"{remote.base}/model-00002-of-00002.safetensors"
    fetch = ObjectStore.fetch

    def late(self: ObjectStore, path: str, start: int, stop: int) -> bytes:
        if path.startswith("model-00001"):
            buckets.put(shard, buckets.get(shard), seconds=0)
        return fetch(self, path, start, stop)

    monkeypatch.setattr(ObjectStore, "fetch", late)
    with pytest.raises(CheckpointChangedError, match=r"model-00002-of-00002\.safetensors changed while it was read"):
        local_model(remote.base, tmp_path / "copies")


def test_a_base_that_is_no_model_is_refused(buckets: Buckets, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a directory"):
        local_model(f"s3://{buckets.make()}/nothing", tmp_path)
