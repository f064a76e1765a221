"""Nothing that a name says is done by the terminal: neither escape characters nor markup."""

import io
import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.text import Text

from flows.console import Bars, PlainRecord, Terminal, plain_table, print_line, print_warnings
from tests.helpers import ROOT

# Clears the screen, sets the title, writes to the clipboard, by ESC and by C1; goes back in the line; turns it around.
EVIL = "a\x1b[2J\x1b]0;owned\x07\x1b]52;c;eA==\x1b\\\x9b2J\x9downed\x9c\x08\x7f\r\x0b\x0c\x00\u202eb"
MARKUP = "[bold]x[/bold] [link=file:///etc]y[/link] [/nothing] :warning:"
FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
# What rich itself writes: colours, and the cursor of a live display.
OURS = re.compile(r"\x1b\[[0-9;]*[mAK]|\x1b\[\?25[lh]|\r\x1b|\r")

SHOWN: dict[str, Callable[[Terminal, str], None]] = {
    "print": lambda console, name: console.print(f"wrote {name}"),
    "print_line": print_line,
    "print_warnings": lambda console, name: print_warnings(console, [name]),
    "table": lambda console, name: console.print(plain_table(f"h {name}", "i", rows=[(name, "x")], title=name)),
    "text": lambda console, name: console.print(Text(name, style="bold")),
    "status": lambda console, name: shown_status(console, name),
    "bars": lambda console, name: shown_bars(console, name),
}


def shown_status(console: Terminal, name: str) -> None:
    with console.status("looking") as status:
        status.update(Text(name))


def shown_bars(console: Terminal, name: str) -> None:
    with Bars(console) as bars:
        bars(name, 1, 2, name)


@pytest.mark.parametrize("name", [EVIL, MARKUP])
@pytest.mark.parametrize("way", SHOWN)
def test_what_a_name_says_is_not_done(way: str, name: str) -> None:
    file = io.StringIO()
    console = Terminal(file=file, force_terminal=True, width=400, legacy_windows=False)
    SHOWN[way](console, name)
    written = OURS.sub("", file.getvalue())
    assert not FORBIDDEN.search(written), ascii(written)
    assert "owned" in written or "[link=file:///etc]y[/link] [/nothing] :warning:" in written, ascii(written)


def test_a_line_is_one_line_whatever_stands_in_it() -> None:
    file = io.StringIO()
    print_line(Terminal(file=file), "digits\nversion 3 is the champion\u2028now\x85now")
    assert file.getvalue() == "digits\\nversion 3 is the champion\\u2028now\\x85now\n"


def test_what_is_logged_is_plain_text() -> None:
    file = io.StringIO()
    handler = logging.StreamHandler(file)
    with pytest.raises(ZeroDivisionError, match="zero") as raised:
        _ = 1 / 0
    raised.value.args = (EVIL,)
    handler.handle(PlainRecord("flows", logging.INFO, __file__, 1, "%s of %s", (EVIL, EVIL), raised._excinfo))
    assert not FORBIDDEN.search(file.getvalue())
    assert file.getvalue().count("owned") > 4


def on_a_terminal(*words: str, home: Path) -> bytes:
    """Return the bytes that a command sends to its terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "RELEX_HOME": str(home), "TERM": "xterm-256color", "COLUMNS": "400"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *words],
        stdin=follower,
        stdout=follower,
        stderr=follower,
        cwd=ROOT,
        env=environment,
    )
    os.close(follower)
    sent = b""
    try:
        while True:
            try:
                chunk = os.read(leader, 65536)
            except OSError:
                # The last one at the other end is gone.
                break
            sent += chunk
        process.wait(120)
    finally:
        process.kill()
        process.communicate()
        os.close(leader)
    return sent


@pytest.mark.slow
def test_no_escape_character_of_a_name_reaches_a_real_terminal(tmp_path: Path) -> None:
    run = tmp_path / "run\x1b]0;owned\x07\x9b2J[link=x]"
    (run / "checkpoint-10").mkdir(parents=True)
    sent = on_a_terminal("inspect", str(run), "--base", str(run), home=tmp_path)
    text = OURS.sub("", sent.decode())
    assert not FORBIDDEN.search(text), ascii(text)
    assert "owned" in text
