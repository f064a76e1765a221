"""A file is whole, old or new."""

from pathlib import Path

import pytest

from evaluation.files import write_file


def test_a_write_that_fails_in_the_middle_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_file(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "two" * 100_000 + "\ud800")
    assert path.read_text() == "one"
    write_file(path, "tre\u0301s")
    assert path.read_text(encoding="utf-8") == "tre\u0301s"
    assert [*tmp_path.iterdir()] == [path]
