import os
from pathlib import Path

import pytest

from evaluation.answers.journal import Journal
from evaluation.errors import JournalError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("one", [["a", False]], seconds=1.5)
        journal.append("two", [[-0.1, True]], seconds=2.0)
    return path


def test_a_journal_remembers_answers_and_time(path: Path) -> None:
    with Journal(path) as journal:
        assert journal.find("one") == [["a", False]]
        assert journal.find("two") == [[-0.1, True]]
        assert journal.find("three") is None
        assert journal.seconds == 3.5


def test_only_the_chunks_that_were_asked_for_count_as_time_spent(path: Path) -> None:
    with Journal(path) as journal:
        journal.find("two")
        journal.find("three")
        journal.append("three", [["b", True]], seconds=0.5)
        assert journal.seconds == 2.5


def test_what_is_appended_is_on_the_disk_before_more_is_asked_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_bytes()))
    with Journal(path) as journal:
        journal.append("three", [["b", True]], seconds=0.5)
        (before,) = synced
        assert before.endswith(b'"answers": [["b", true]]}\n')


def test_a_last_line_torn_anywhere_is_dropped_and_writing_goes_on(path: Path) -> None:
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        with Journal(path) as journal:
            assert journal.find("one") is not None
            assert journal.find("two") is None
            journal.append("two", [[-0.1, True]], seconds=2.0)
        assert path.read_bytes() == whole


def test_damage_before_the_last_line_is_refused_by_line(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'{"chunk": "one"', b'{"chunk" "one"'))
    with pytest.raises(JournalError, match=r"journal\.jsonl: line 1 is damaged"):
        Journal(path)
