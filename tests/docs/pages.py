"""The Markdown files that readers are given: their code blocks, links and anchors."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", ROOT / "AGENTS.md", *sorted((ROOT / "docs").glob("*.md")))
EXAMPLES = tuple(sorted((ROOT / "examples").glob("*.yaml")))

_FENCE = re.compile(r"^(`{3,})(.*?)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
_SEPARATORS = set(";|&()")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return [body for _, match, body in _FENCE.findall(path.read_text(encoding="utf-8")) if match == language]


def prose(path: Path) -> str:
    """Return the page without its code blocks."""
    return _FENCE.sub("", path.read_text(encoding="utf-8"))


def shell_lines(path: Path) -> list[str]:
    """Return every line of a page's sh blocks, or every command that a config's comments show."""
    if path.suffix == ".yaml":
        # Indented, so that prose which begins with a command's name is none.
        return re.findall(r"^# {3}((?:relex|make) .*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [line for block in blocks(path, "sh") for line in block.splitlines() if line.strip()]


def commands(line: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell line, which may join several."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in (*lexer, ";"):
        if set(word) <= _SEPARATORS:
            if words:
                yield words
            words = []
        else:
            words.append(word)


def links(path: Path) -> list[str]:
    """Return the targets of a page's links and figures."""
    text = re.sub(r"`[^`\n]*`", "", prose(path))
    figures = re.findall(r"^```\{figure\} (\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return [*re.findall(r"\]\(([^)\s]+)\)", text), *figures]


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#{1,6} (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paragraphs(path: Path) -> Iterator[str]:
    """Yield the paragraphs of prose, list items one by one; tables and headings are none."""
    for block in re.split(r"\n\s*\n", prose(path)):
        if not block.lstrip().startswith(("#", "|", "<!--", "    ")):
            yield from re.split(r"\n(?=- |\d+\. )", block.strip())
