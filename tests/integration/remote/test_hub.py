import time
from pathlib import Path

import pytest
from safetensors.torch import save

from relex import store
from relex.errors import CheckpointIncompleteError, StoreError, UnreachableError
from relex.files.block_cache import BlockCache
from relex.files.directory import Kind
from relex.files.location import open_directory
from relex.output.materialise import rebuild
from relex.trajectory import Trajectory, open_trajectory
from tests.helpers.hub_server import PAGE, TOKEN, Hub, files
from tests.helpers.proxy import Faults, proxy
from tests.helpers.trajectories import MIB, STEPS, Run, content, drift, measure, predict, write


@pytest.fixture
def pushed(hub: Hub, local: Run) -> Run:
    """The run with a branch for each step, its base, and the same run with a folder for each step."""
    hub.make("org/base").commit(files(local.base))
    branches, folders = hub.make("org/branches"), hub.make("org/folders")
    for step in STEPS:
        branches.commit(files(local.run / f"checkpoint-{step}"), branch=f"step_{step}")
    folders.commit(files(local.run) | {"README.md": b"# a run"})
    return local


def _open(run: str, base: str, blocks: BlockCache | None = None) -> Trajectory:
    opened = store.open_base(base, blocks=blocks)
    return open_trajectory(opened, store.observed(store.scan(run, opened, now=time.time(), blocks=blocks), run))


@pytest.mark.parametrize("run", ["hf://org/branches", "hf://org/folders", "hf://org/folders@main"])
def test_a_run_on_the_hub_predicts_what_the_same_run_on_disk_does(pushed: Run, tmp_path: Path, run: str) -> None:
    ours = pushed.open()
    with BlockCache(tmp_path / "cache") as blocks:
        theirs = _open(run, "hf://org/base", blocks)
        assert theirs.steps == STEPS
        assert measure(theirs).digests == measure(ours).digests
        write(theirs, predict(theirs), tmp_path / "theirs")
    write(ours, predict(ours), tmp_path / "ours")
    assert content(tmp_path / "theirs") == content(tmp_path / "ours")


def test_the_manifest_names_commits_and_they_rebuild_the_same_bytes_after_the_branches_moved(
    hub: Hub, pushed: Run, tmp_path: Path
) -> None:
    trajectory = _open("hf://org/branches", "hf://org/base")
    out = write(trajectory, predict(trajectory), tmp_path / "out")
    commits = hub.repositories["org/branches"].branches
    expected = {f'"hf://org/branches@{commits[f"step_{step}"]}"' for step in STEPS}
    assert all(location in (out / "relex.json").read_text() for location in expected)
    for step in STEPS:
        hub.repositories["org/branches"].commit({"model.safetensors": save(drift(seed=1)[step])}, branch=f"step_{step}")
    hub.repositories["org/base"].commit({})
    rebuild(out, tmp_path / "again", memory=64 * MIB, threads=2)
    assert content(tmp_path / "again") == content(out)


def test_a_branch_that_moves_while_it_is_read_is_read_as_it_was_and_seen_by_the_next_scan(
    hub: Hub, pushed: Run
) -> None:
    before = _open("hf://org/branches", "hf://org/base")
    hub.repositories["org/branches"].commit(
        {"model.safetensors": save(drift(seed=1)[40]), "config.json": b"{}"}, branch="step_40"
    )
    assert measure(before).digests == measure(pushed.open()).digests
    after = _open("hf://org/branches", "hf://org/base")
    changed = [
        old.step
        for old, new in zip(before.checkpoints, after.checkpoints, strict=True)
        if old.weights.identity != new.weights.identity
    ]
    assert changed == [40]


def test_a_scan_that_finds_nothing_new_is_one_request(hub: Hub, pushed: Run) -> None:
    base = store.open_base("hf://org/base")
    store.scan("hf://org/branches", base, now=0.0)
    hub.requests.clear()
    checkpoints = store.scan("hf://org/branches", base, now=0.0)
    assert [each.step for each in checkpoints] == list(STEPS)
    assert hub.requests == ["/api/models/org/branches/refs"]


def test_a_listing_longer_than_a_page_is_read_to_its_end(hub: Hub, pushed: Run) -> None:
    names = [f"file-{number}" for number in range(3 * PAGE + 1)]
    hub.make("org/many").commit(dict.fromkeys(names, b"x"))
    directory = open_directory("hf://org/many")
    assert sorted(directory.files()) == sorted(names)
    assert directory.kind is Kind.COMMIT


def test_a_version_is_the_digest_of_the_content(hub: Hub) -> None:
    hub.make("org/one").commit({"config.json": b"{}", "big": b"x" * 5000, "a/b": b"1"})
    directory = open_directory("hf://org/one")
    large, small = directory.files()["big"], directory.files()["config.json"]
    assert (len(large.version), len(small.version)) == (64, 40)
    assert directory.identity("big") == large
    assert directory.enter("a").read("b") == b"1"
    assert directory.read("big", 10, 20) == b"x" * 10


def test_a_signed_address_is_asked_for_once_and_again_when_it_has_expired(hub: Hub) -> None:
    data = bytes(range(250)) * 8000
    hub.make("org/one").commit({"big": data})
    directory = open_directory("hf://org/one")
    hub.uses = 3
    parts = [directory.read("big", start, start + 300_000) for start in range(300_000, len(data), 300_000)]
    assert b"".join(parts) == data[300_000:]
    assert sum("/resolve/" in path for path in hub.requests) == 2
    assert sum("/cdn/" in path for path in hub.requests) == len(parts) + 1


def test_a_token_goes_to_the_hub_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.make("org/private", access="private").commit({"big": b"x" * 600_000})
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    directory = open_directory("hf://org/private")
    assert len(directory.read("big", 300_000, 600_000)) == 300_000
    assert len(directory.read("big", 400_000, 600_000)) == 200_000
    assert hub.leaked == []
    assert TOKEN not in f"{directory!r} {directory}"


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hf://org/none", "hf://org/none: the Hub has no such repository, or it is private.*hf auth login"),
        ("hf://org/private", "the Hub has no such repository, or it is private"),
        ("hf://org/gated", "hf://org/gated is gated: accept its conditions"),
        ("hf://org/base@nowhere", "hf://org/base@nowhere: the repository has no such revision"),
        ("hf://org/base@" + "0" * 40, "the repository has no such revision"),
    ],
)
def test_what_the_hub_does_not_give_is_named_in_one_line(pushed: Run, hub: Hub, location: str, message: str) -> None:
    hub.make("org/private", access="private")
    hub.make("org/gated", access="gated")
    with pytest.raises(UnreachableError, match=message) as caught:
        store.open_base(location)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("location", ["hf://gpt2", "hf://", "hf://org/repo@", "hf:///x"])
def test_a_location_written_otherwise_says_how(location: str) -> None:
    with pytest.raises(StoreError, match="is not written as hf://org/repo"):
        open_directory(location)


def test_a_folder_and_a_branch_of_one_name_are_refused(hub: Hub, pushed: Run) -> None:
    hub.repositories["org/folders"].commit({}, branch="checkpoint-10")
    with pytest.raises(StoreError, match="both a folder and a branch checkpoint-10"):
        _open("hf://org/folders", "hf://org/base")


def test_a_folder_in_a_revision_is_a_base(hub: Hub, pushed: Run) -> None:
    weights = store.open_base("hf://org/folders@main/checkpoint-25")
    sha = hub.repositories["org/folders"].branches["main"]
    assert str(weights.directory) == f"hf://org/folders@{sha}/checkpoint-25"


def test_what_a_commit_lacks_will_never_come(hub: Hub, pushed: Run) -> None:
    hub.repositories["org/branches"].commit({"config.json": b"{}"}, branch="step_25")
    base = store.open_base("hf://org/base")
    checkpoints = {checkpoint.step: checkpoint for checkpoint in store.scan("hf://org/branches", base, now=time.time())}
    assert checkpoints[25].state is store.State.BROKEN
    with pytest.raises(CheckpointIncompleteError, match=r"has no config\.json"):
        store.open_base("hf://org/branches")


def test_a_hub_that_refuses_now_and_then_is_asked_again(hub: Hub, pushed: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    faults = Faults(refuse=lambda method, path, number: 503 if number % 4 == 1 else None)
    with proxy(hub.url, faults) as url:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        assert measure(_open("hf://org/branches", "hf://org/base")).digests == measure(pushed.open()).digests


def test_a_hub_that_is_away_is_named_in_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UnreachableError, match=r"hf://org/base: the Hub does not answer \(ConnectError\)"):
        store.open_base("hf://org/base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UnreachableError, match=r"does not answer \(OfflineModeIsEnabled\).*HF_HUB_OFFLINE"):
        store.open_base("hf://org/base")
