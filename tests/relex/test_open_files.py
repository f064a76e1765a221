from pathlib import Path

import pytest

from relex import kernel, open_files
from relex.files.local import LocalDirectory
from relex.open_files import OpenFiles
from tests.helpers.trajectories import Run, measure

HERE = Path("/proc/self/fd")


def _opened() -> set[str]:
    return {str(link.readlink()) for link in HERE.iterdir() if link.is_symlink()}


def test_a_pass_leaves_no_file_open(run: Run) -> None:
    measure(run.open())
    assert not [name for name in _opened() if str(run.run) in name]


def test_those_in_use_stay_open_and_others_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_files, "MOST", 2)
    directory = LocalDirectory(tmp_path)
    for name in "abcd":
        (tmp_path / name).write_bytes(name.encode())
    files = OpenFiles()
    with files.using([(directory, "a"), (directory, "gone")]) as (first, none):
        assert none is None
        for name in "bcd":
            with files.using([(directory, name)]) as (one,):
                assert one is not None
        assert {Path(name).name for name in _opened() if name.startswith(str(tmp_path))} == {"a", "d"}
        with files.using([(directory, "a")]) as (again,):
            assert again == first
    files.close()
    assert not [name for name in _opened() if name.startswith(str(tmp_path))]


def test_without_the_loops_in_c_the_same_is_read(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = measure(run.open())
    monkeypatch.setattr(kernel, "BUILT", False)
    assert measure(run.open()).digests == expected.digests
