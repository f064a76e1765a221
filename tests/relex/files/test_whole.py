"""A file that is complete or absent, on a disk that gets full."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from relex.errors import OutputError
from relex.files.whole import write_whole


def old(path: Path) -> Path:
    path.write_bytes(b"half")
    os.utime(path, (0, 0))
    return path


def test_what_a_killed_process_left_goes_with_the_next_file(tmp_path: Path) -> None:
    left, young, other = old(tmp_path / ".a.tmp"), tmp_path / ".b.tmp", old(tmp_path / "kept.tmp")
    young.write_bytes(b"half")
    held = old(tmp_path / ".c.tmp")
    with held.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        write_whole(b"whole", tmp_path / "gram")
    assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"gram", young.name, held.name, other.name}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    said = rf"{tmp_path}/new/gram takes 5 bytes, and {tmp_path}/new has room for \d+ \(No space left on device\)\. Make"
    with pytest.raises(OutputError, match=said):
        write_whole(b"whole", tmp_path / "new" / "gram")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_has_the_mode_that_its_user_gives_files(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    write_whole(b"whole", tmp_path / "gram")
    assert (tmp_path / "gram").stat().st_mode == (tmp_path / "plain").stat().st_mode
