"""A file is whole, old or new, and what is unfinished has a name of its own."""

from pathlib import Path

import pytest

from deploy.files import unfinished_path, write_file


def test_a_write_that_fails_in_the_middle_leaves_what_was_there_and_the_next_one_clears_up(tmp_path: Path) -> None:
    path = tmp_path / "services" / "mlflow.json"
    write_file(path, "one")
    with pytest.raises(UnicodeEncodeError):
        write_file(path, "two" * 100_000 + "\ud800")
    assert path.read_text() == "one"
    # What the reaper takes for left behind.
    assert unfinished_path(path).match(".*.partial")
    write_file(path, "three")
    assert path.read_text() == "three"
    assert [*path.parent.iterdir()] == [path]
