"""A file is whole, old or new."""

import fcntl
import os
from pathlib import Path

import pytest

from evaluation.files import write_file


def test_a_write_that_fails_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_file(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "two" * 100_000 + "\ud800")
    assert path.read_text() == "one"
    assert [*tmp_path.iterdir()] == [path]
    write_file(path, "tre\u0301s")
    assert path.read_text(encoding="utf-8") == "tre\u0301s"
    assert [*tmp_path.iterdir()] == [path]


def test_what_a_killed_process_left_goes_with_the_next_write_and_what_a_live_one_writes_stays(tmp_path: Path) -> None:
    path, left, live = (tmp_path / name for name in ("report.json", ".report.json.7", ".report.json.8"))
    for hidden in (left, live):
        hidden.write_text("half")
        os.utime(hidden, (0, 0))
    (tmp_path / ".report.json.9").write_text("just begun")
    with live.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        write_file(path, "whole")
    assert {each.name for each in tmp_path.iterdir()} == {"report.json", ".report.json.8", ".report.json.9"}
