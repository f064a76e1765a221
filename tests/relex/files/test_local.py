"""What a directory of a disk opens: regular files of its own tree, and what the Hub's cache links them to."""

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from relex import store
from relex.errors import CheckpointMismatchError, UnreachableError
from relex.files.directory import MOST_WHOLE
from relex.files.local import LocalDirectory
from relex.output.writer import side_files
from relex.store import State, StoredCheckpoint
from tests.helpers.trajectories import STEPS, Run, quiet

ENVIRONMENT = Path("/proc/self/environ")
DIGEST = "0123456789abcdef" * 4


def scan(run: Run) -> dict[int, StoredCheckpoint]:
    return {
        checkpoint.step: checkpoint for checkpoint in store.scan(run.run, store.open_base(run.base), now=time.time())
    }


def move_out(file: Path) -> Path:
    """Leave a link where the file was."""
    outside = file.parent.parent.parent / f"outside-{file.name}"
    file.rename(outside)
    file.symlink_to(outside)
    return outside


@pytest.mark.parametrize("name", ["vocab.txt", "tokenizer.json", "generation_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("target", [ENVIRONMENT, Path("/etc/passwd")])
def test_a_side_file_that_leads_out_is_refused_in_a_checkpoint_and_in_a_base(run: Run, name: str, target: Path) -> None:
    step = run.run / "checkpoint-75"
    (step / name).symlink_to(target)
    quiet_links(step)
    checkpoints = scan(run)
    assert [each.state for each in checkpoints.values()] == [State.READY] * 4 + [State.BROKEN]
    assert f"{step / name} is a link to {target.resolve()}, outside of it" in checkpoints[75].reason
    base = store.open_base(run.base)
    (run.base / name).symlink_to(target)
    with pytest.raises(CheckpointMismatchError, match=f"base/{name} is a link to {target.resolve()}, outside"):
        store.open_base(run.base)
    with pytest.raises(CheckpointMismatchError, match=f"base/{name} is a link to {target.resolve()}, outside"):
        side_files(base, base)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "trainer_state.json"])
def test_what_is_read_of_a_checkpoint_does_not_lead_out(run: Run, name: str) -> None:
    step = run.run / "checkpoint-75"
    (step / "trainer_state.json").write_text("{}")
    outside = move_out(step / name)
    quiet_links(step)
    checkpoint = scan(run)[75]
    assert checkpoint.state is State.BROKEN
    assert f"{step / name} is a link to {outside}, outside of it" in checkpoint.reason


def test_a_step_directory_does_not_lead_out_of_the_run(run: Run) -> None:
    step = run.run / "checkpoint-75"
    elsewhere = step.rename(run.run.parent / "elsewhere")
    step.symlink_to(elsewhere)
    os.utime(step, (0, 0), follow_symlinks=False)
    checkpoint = scan(run)[75]
    assert checkpoint.state is State.BROKEN
    assert f"{step}/config.json is a link to {elsewhere}/config.json, outside of it" in checkpoint.reason


def test_links_inside_a_checkpoint_and_inside_a_run_and_to_a_run_are_followed(run: Run, tmp_path: Path) -> None:
    step = run.run / "checkpoint-75"
    (step / "inner").mkdir()
    (step / "model.safetensors").rename(step / "inner" / "weights")
    (step / "model.safetensors").symlink_to("inner/weights")
    quiet(step)
    (run.run / "checkpoint-40").rename(run.run / "kept")
    (run.run / "checkpoint-40").symlink_to("kept")
    (tmp_path / "latest").symlink_to(run.run)
    checkpoints = scan(Run(run.base, tmp_path / "latest"))
    assert [each.state for each in checkpoints.values()] == [State.READY] * len(STEPS)


def test_a_link_into_another_checkpoint_is_refused(run: Run) -> None:
    file = run.run / "checkpoint-75" / "model.safetensors"
    file.unlink()
    file.symlink_to("../checkpoint-40/model.safetensors")
    assert "outside of it" in scan(run)[75].reason


@pytest.mark.parametrize("shared", [False, True])
def test_a_model_in_the_cache_of_the_hub_is_read(run: Run, tmp_path: Path, shared: bool) -> None:
    cache = tmp_path / "hub"
    revision = cache / "models--org--name" / "snapshots" / "f00d"
    revision.mkdir(parents=True)
    blobs = cache / "models--org--name" / "blobs"
    blobs.mkdir()
    (cache / "blobs" / "01").mkdir(parents=True)
    for number, file in enumerate(run.base.iterdir()):
        digest = f"{number}{DIGEST[1:]}"
        blob = cache / "blobs" / "01" / digest if shared else blobs / digest
        blob.write_bytes(file.read_bytes())
        if shared:
            (blobs / digest).symlink_to(f"../../blobs/01/{digest}")
        (revision / file.name).symlink_to(f"../../blobs/{digest}")
    assert store.open_base(revision).tensors.keys() == store.open_base(run.base).tensors.keys()
    assert "config.json" in side_files(store.open_base(revision), store.open_base(revision))


@pytest.mark.parametrize("place", ["blobs", "models--org--name/blobs"])
def test_a_directory_called_blobs_is_no_cache(run: Run, tmp_path: Path, place: str) -> None:
    blob = tmp_path / place / DIGEST
    blob.parent.mkdir(parents=True)
    file = run.base / "config.json"
    file.rename(blob)
    file.symlink_to(blob)
    with pytest.raises(CheckpointMismatchError, match=r"is a link to .*/blobs/0123.*, outside of it"):
        store.open_base(run.base)


def test_blobs_that_lead_elsewhere_are_no_cache(run: Run, tmp_path: Path) -> None:
    revision = tmp_path / "models--org--name" / "snapshots" / "f00d"
    revision.parent.mkdir(parents=True)
    run.base.rename(revision)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / DIGEST).write_text("secret")
    (tmp_path / "models--org--name" / "blobs").symlink_to(tmp_path / "private")
    (revision / "vocab.txt").symlink_to(f"../../blobs/{DIGEST}")
    with pytest.raises(CheckpointMismatchError, match=f"vocab.txt is a link to .*private/{DIGEST}, outside of it"):
        store.open_base(revision)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("/dev/tty")]
)
def test_a_special_file_is_never_opened(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "vocab.txt")
    directory = LocalDirectory(tmp_path)
    assert directory.files() == {}
    reads: list[Callable[[], Any]] = [
        lambda: directory.read("vocab.txt"),
        lambda: directory.read_into("vocab.txt", 0, memoryview(bytearray(8))),
        lambda: directory.check("vocab.txt"),
    ]
    for read in reads:
        with pytest.raises(CheckpointMismatchError, match=r"vocab\.txt is no regular file, and nothing else is opened"):
            read()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "trainer_state.json"])
def test_a_file_of_gigabytes_that_would_be_read_whole_is_not(run: Run, name: str) -> None:
    step = run.run / "checkpoint-75"
    with (step / name).open("ab") as file:
        file.truncate(8 << 30)
    quiet(step)
    checkpoint = scan(run)[75]
    assert checkpoint.state is State.BROKEN
    assert f"{step / name} has {8 << 30} bytes, and what is read whole has at most {MOST_WHOLE}" in checkpoint.reason


def test_a_directory_that_is_moved_while_it_is_read_is_not_said_to_lead_out(tmp_path: Path) -> None:
    class Moving(LocalDirectory):
        def _check_inside(self, path: Path, real: str) -> None:
            # As when it was opened by its other name, a moment before.
            super()._check_inside(path, real.replace("/run/", "/former/"))

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError):
        Moving(tmp_path / "run").read("config.json")


def fail(monkeypatch: pytest.MonkeyPatch, function: str, *, number: int, times: int, only: str = "") -> None:
    """Let a function of the operating system fail for whom it is given a path that ends in `only`."""
    left = [times]
    real: Callable[..., Any] = getattr(os, function)

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(only) and left[0] > 0:
            left[0] -= 1
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, function, failing)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
@pytest.mark.parametrize("function", ["scandir", "open"])
def test_an_error_of_the_moment_is_not_seen(
    run: Run, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    fail(monkeypatch, function, number=number, times=3)
    assert {checkpoint.state for checkpoint in scan(run).values()} == {State.READY}


def test_a_step_whose_disk_fails_is_waited_for_and_the_others_are_read(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(monkeypatch, "open", number=errno.EIO, times=100, only="checkpoint-25/model.safetensors")
    checkpoints = scan(run)
    assert {step for step, each in checkpoints.items() if each.state is State.READY} == {10, 20, 40, 75}
    assert checkpoints[25].state is State.NOT_YET
    assert "checkpoint-25/model.safetensors cannot be read now (Input/output error)" in checkpoints[25].reason
    with pytest.raises(UnreachableError, match=r"model.safetensors cannot be read now \(Input/output error\)"):
        LocalDirectory(run.run / "checkpoint-25").read("model.safetensors")


def test_a_step_that_may_not_be_read_is_broken_and_no_other(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "scandir", number=errno.EACCES, times=100, only="checkpoint-25")
    checkpoints = scan(run)
    assert {step for step, each in checkpoints.items() if each.state is State.READY} == {10, 20, 40, 75}
    assert checkpoints[25].state is State.BROKEN
    assert "checkpoint-25 cannot be read (Permission denied)" in checkpoints[25].reason


@pytest.mark.parametrize("place", ["checkpoint-25", "checkpoint-25/model.safetensors", "checkpoint-25/config.json"])
def test_a_link_to_itself_breaks_its_step_and_no_other(run: Run, place: str) -> None:
    path = run.run / place
    if path.is_dir():
        path.rename(run.run / "away")
    else:
        path.unlink()
    path.symlink_to(path.name)
    if place.endswith("/model.safetensors"):
        quiet_links(path.parent)
    checkpoints = scan(run)
    assert {10, 20, 40, 75} <= {step for step, each in checkpoints.items() if each.state is State.READY}
    # A checkpoint without a configuration of its own is read by the base's.
    assert checkpoints[25].state is (State.READY if place.endswith(".json") else State.BROKEN)
    if place == "checkpoint-25":
        assert "checkpoint-25 cannot be read (Too many levels of symbolic links)" in checkpoints[25].reason


def test_links_to_directories_above_do_not_multiply(run: Run) -> None:
    step = run.run / "checkpoint-25"
    (step / "model.safetensors").unlink()
    for name in ("a", "b", "c"):
        (step / name).symlink_to(".")
    began = time.monotonic()
    checkpoint = scan(run)[25]
    assert checkpoint.state is not State.READY
    assert checkpoint.directory.newest_file() > 0
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"[]", "its header holds a JSON list, not an object"),
        (b"3", "its header holds a JSON int, not an object"),
        (b'{"w": []}', "tensor w has no dtype, shape and place"),
        (
            b'{"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
            "tensor w has a dtype that is a JSON list",
        ),
        (b'{"w": {"dtype": "F32", "shape": [' + b"1" * 5000 + b'], "data_offsets": [0, 4]}}', "4300 digits"),
        (b"[" * 100_000 + b"]" * 100_000, "recursion"),
    ],
)
def test_a_header_of_another_shape_breaks_its_step_and_no_other(run: Run, header: bytes, said: str) -> None:
    step = run.run / "checkpoint-25"
    (step / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    quiet(step)
    checkpoints = scan(run)
    assert checkpoints[25].state is State.BROKEN
    assert said in checkpoints[25].reason
    assert {step for step, each in checkpoints.items() if each.state is State.READY} == {10, 20, 40, 75}


def quiet_links(directory: Path) -> None:
    """Say of a directory and what is in it that it changed long ago, links themselves and not what they lead to."""
    for path in (*directory.iterdir(), directory):
        os.utime(path, (0, 0), follow_symlinks=False)
