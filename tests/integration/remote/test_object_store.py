import random
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest
import s3fs
import torch

from relex import store
from relex.errors import CheckpointChangedError, StoreError, UnreachableError
from relex.files import object_store
from relex.files.block_cache import BlockCache
from relex.files.directory import Kind
from relex.files.location import open_directory
from relex.output.materialise import rebuild
from relex.store import State, StoredCheckpoint
from relex.trajectory import Trajectory, open_trajectory
from tests.helpers import dcp_files, peft_files, verl_files
from tests.helpers.buckets import Buckets, RemoteRun, write_s3_run
from tests.helpers.proxy import Faults, proxy
from tests.helpers.trajectories import MIB, STEPS, Run, content, drift, measure, predict, write, write_run

MODEL = "model.safetensors"


def _scan(remote: RemoteRun, *, now: float | None = None) -> dict[int, StoredCheckpoint]:
    base = store.open_base(remote.base)
    checkpoints = store.scan(remote.run, base, now=time.time() if now is None else now)
    return {each.step: each for each in checkpoints}


def _open(remote: RemoteRun, blocks: BlockCache | None = None) -> Trajectory:
    base = store.open_base(remote.base, blocks=blocks)
    stored = store.scan(remote.run, base, now=time.time(), blocks=blocks)
    return open_trajectory(base, store.observed(stored, remote.run))


@pytest.mark.parametrize("size", [0, 64 * MIB], ids=["no cache", "a cache"])
def test_a_run_in_a_bucket_predicts_what_the_same_run_on_disk_does(
    remote: RemoteRun, local: Run, tmp_path: Path, size: int
) -> None:
    ours = local.open()
    with BlockCache(tmp_path / "cache", size=size) as blocks:
        theirs = _open(remote, blocks)
        assert measure(theirs).digests == measure(ours).digests
        write(theirs, predict(theirs), tmp_path / "theirs")
    write(ours, predict(ours), tmp_path / "ours")
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")
    assert [each.steps for each in (theirs, ours)] == [STEPS, STEPS]


def test_a_manifest_of_a_bucket_rebuilds_the_same_bytes(remote: RemoteRun, tmp_path: Path) -> None:
    trajectory = _open(remote)
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    assert f'"{remote.run}/checkpoint-40"' in (out / "relex.json").read_text()
    assert "not-a-real-key" not in (out / "relex.json").read_text()
    rebuild(out, tmp_path / "again", memory=64 * MIB, threads=2)
    assert content(tmp_path / "again") == content(out)


def test_a_scan_is_one_listing_once_the_headers_are_known(
    buckets: Buckets, remote: RemoteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = store.open_base(remote.base)
    store.scan(remote.run, base, now=time.time())
    faults = Faults()
    with proxy(buckets.url, faults) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        assert len(store.scan(remote.run, base, now=time.time())) == len(STEPS)
    assert [method for method, path in faults.requests] == ["GET"]
    assert "list-type=2" in faults.requests[0][1]


def test_objects_are_waited_for_until_they_have_been_quiet(buckets: Buckets, remote: RemoteRun) -> None:
    model = f"{remote.run}/checkpoint-75/{MODEL}"
    buckets.put(model, buckets.get(model), seconds=0)
    assert _scan(remote)[75].state is State.NOT_YET
    assert _scan(remote, now=time.time() + 32)[75].state is State.READY


def test_a_marker_of_an_empty_directory_is_no_file(buckets: Buckets, remote: RemoteRun) -> None:
    buckets.put(f"{remote.run}/checkpoint-10/", b"")
    buckets.put(f"{remote.run}/", b"")
    directory = open_directory(f"{remote.run}/checkpoint-10/")
    assert sorted(directory.files()) == ["config.json", MODEL]
    assert directory.kind is Kind.OBJECTS
    assert open_directory(remote.run).children() == tuple(sorted(f"checkpoint-{step}" for step in STEPS))
    assert tuple(_scan(remote)) == STEPS


def test_a_prefix_is_not_its_longer_neighbour(buckets: Buckets, remote: RemoteRun) -> None:
    buckets.put(f"{remote.run}-2/checkpoint-80/config.json", b"{}")
    assert tuple(_scan(remote)) == STEPS
    assert not open_directory(remote.run[:-1]).exists()
    assert not open_directory(f"{remote.run}/checkpoint-10/{MODEL}").exists()


def test_a_listing_and_a_look_agree_on_an_object_though_one_knows_fractions_of_a_second() -> None:
    listed = {"size": 3, "ETag": "x", "LastModified": datetime(2026, 11, 20, 12, 0, 0, 250_000, tzinfo=UTC)}
    looked = listed | {"LastModified": datetime(2026, 11, 20, 12, tzinfo=UTC)}
    assert object_store._identity("a/b", listed) == object_store._identity("a/b", looked)


DAMAGES = {
    "delete": "was there when the pass began and cannot be opened now",
    "truncate": "ended at byte .* inside tensor",
    "replace": "changed while it was read .*version",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", [0, 64 * MIB], ids=["no cache", "a cache"])
def test_an_object_that_goes_while_it_is_read_is_named(
    buckets: Buckets, remote: RemoteRun, tmp_path: Path, damage: str, size: int
) -> None:
    model = f"{remote.run}/checkpoint-40/{MODEL}"
    with BlockCache(tmp_path, size=size) as blocks:
        trajectory = _open(remote, blocks)
        if damage == "delete":
            buckets.delete(model)
        elif damage == "truncate":
            buckets.put(model, buckets.get(model)[:70_000])
        else:
            buckets.put(model, buckets.get(f"{remote.run}/checkpoint-25/{MODEL}"))
        with pytest.raises(CheckpointChangedError, match=f"checkpoint-40/{MODEL} {DAMAGES[damage]}"):
            measure(trajectory)


def test_the_same_bytes_put_again_are_another_object(buckets: Buckets, remote: RemoteRun) -> None:
    trajectory = _open(remote)
    model = f"{remote.run}/checkpoint-40/{MODEL}"
    buckets.put(model, buckets.get(model), seconds=0)
    with pytest.raises(CheckpointChangedError, match=f"checkpoint-40/{MODEL} changed"):
        trajectory.check_unchanged()


def test_a_store_that_refuses_and_breaks_off_now_and_then_is_asked_again(
    buckets: Buckets, remote: RemoteRun, local: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(0)
    faults = Faults(
        refuse=lambda method, path, number: 503 if chance.random() < 0.2 else None,
        cut=lambda method, path, number: method == "GET" and chance.random() < 0.1,
    )
    with proxy(buckets.url, faults) as url, BlockCache(tmp_path) as blocks:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        s3fs.S3FileSystem.clear_instance_cache()
        assert measure(_open(remote, blocks)).digests == measure(local.open()).digests


def test_a_store_that_never_answers_is_named_in_one_line(
    buckets: Buckets, remote: RemoteRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UnreachableError, match=r"base does not answer .*Check the address, the credentials") as caught:
        store.open_base(remote.base)
    assert "\n" not in str(caught.value)
    assert "not-a-real-key" not in str(caught.value)


def test_no_bucket_no_password_and_no_such_protocol(buckets: Buckets) -> None:
    with pytest.raises(UnreachableError, match="s3://no-such-bucket/x: there is no such bucket"):
        store.open_base("s3://no-such-bucket/x")
    with pytest.raises(StoreError, match="holds a password") as caught:
        open_directory("s3://user:hunter2@bucket/x")
    assert "hunter2" not in str(caught.value)
    with pytest.raises(StoreError, match="zz:// is no kind of store that fsspec knows"):
        open_directory("zz://bucket/x").exists()


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(
        StoreError, match=r"s3:// needs a library that is not installed: pip install 'relex-rlvr\[s3\]'"
    ):
        open_directory("s3://bucket/x").exists()


def test_another_protocol_of_fsspec_is_read_by_the_same_code(local: Run) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(local.base), "memory://somewhere/base", recursive=True)
    try:
        directory = open_directory("memory://somewhere/base")
        assert sorted(directory.files()) == sorted(path.name for path in local.base.iterdir())
        assert store.open_base("memory://somewhere/base").tensors.keys() == store.open_base(local.base).tensors.keys()
    finally:
        memory.rm("somewhere", recursive=True)


FLOATS = {
    step: {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    for step, state in drift(stored=torch.float32).items()
}
WRITERS: Mapping[str, Callable[[Path], Run]] = {
    "verl_fsdp": lambda root: verl_files.write_run(root, FLOATS),
    "dcp": lambda root: dcp_files.write_dcp_run(root, FLOATS),
    "dcp_safetensors": lambda root: dcp_files.write_dcp_safetensors_run(root, FLOATS),
    "peft": peft_files.write_run,
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_read_from_a_bucket(buckets: Buckets, tmp_path: Path, layout: str) -> None:
    run = WRITERS[layout](tmp_path)
    with BlockCache(tmp_path / "cache", size=64 * MIB) as blocks:
        theirs = _open(write_s3_run(buckets, run), blocks)
        assert {checkpoint.weights.layout for checkpoint in theirs.checkpoints} == {layout}
        assert measure(theirs).digests == measure(run.open()).digests


def test_a_sharded_run_reads_the_same(buckets: Buckets, tmp_path: Path) -> None:
    tmp_path.joinpath("sharded").mkdir()
    run = write_run(tmp_path / "sharded", drift(), shards=3)
    assert measure(_open(write_s3_run(buckets, run))).digests == measure(run.open()).digests
