"""What was predicted next to what was reached, on terminals that are narrow and wide."""

import io

import pytest

from flows.console import Terminal
from flows.drift.page import HEADINGS, show
from flows.drift.record import Compared
from relex.drift import Drift

ROW = Compared(
    "key",
    75,
    "relex-pinned:damping=0.3",
    500,
    510,
    0.21,
    "",
    "weights",
    Drift(-0.314, 0.87, 1.24, 2.0, (1.0, 1.5), 0.0),
)


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (200, 1)])
def test_no_number_and_no_name_is_broken_at_that_width(width: int, tables: int) -> None:
    file = io.StringIO()
    show(Terminal(file=file, width=width), [ROW], [])
    table, _, _ = file.getvalue().partition("warning: ")
    lines = [line.rstrip() for line in table.splitlines()]
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if line.strip().startswith("relex-pinned:damping=0.3 @ 500")]
    assert len(rows) == tables
    shown = " ".join(lines)
    for part in (*HEADINGS, "75", "510", "-0.31", "≥0.21", "0.87", "1.24", "outside", "worse than expected"):
        assert part in shown, part
