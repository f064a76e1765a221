"""Brackets: where a LaTeX text may be cut, since what stands there is inside no bracket."""

import re
from collections.abc import Sequence

from evaluation.grading.formula import UnreadableError

_TOP = re.compile(
    r"\\text\{(?:or|and)\}|\\[A-Za-z]+|\\.|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\.\.\.|[^\s\\]", re.DOTALL
)


def split(text: str, separators: Sequence[str]) -> list[str]:
    """Return the parts of a text between separators that stand in no bracket, stripped."""
    parts, start = [], 0
    for position, token in top_level(text):
        if token in separators and position >= start:
            parts.append(text[start:position].strip())
            start = position + len(token)
    return [*parts, text[start:].strip()]


def top_level(text: str) -> list[tuple[int, str]]:
    """Return the tokens that stand in no bracket, with their places.

    Round and square brackets close each other, as those of intervals do, and one that would close nothing opens.
    """
    tokens, depth, position = [], 0, 0
    matrices = 0
    while position < len(text):
        match = _TOP.search(text, position)
        if match is None:
            break
        token = match[0]
        position = match.end()
        if token in {r"\begin", r"\end"}:
            matrices += 1 if token == r"\begin" else -1
        if token in {"(", "[", "{", r"\{", r"\langle", r"\lfloor", r"\lceil"}:
            # [0,1[ closes with what else opens.
            if token == "[" and depth and _closes(text, position):
                depth -= 1
            else:
                depth += 1
        elif token in {")", "]", "}", r"\}", r"\rangle", r"\rfloor", r"\rceil"}:
            depth = depth + 1 if token == "]" and depth == 0 else depth - 1
        elif depth == 0 and matrices == 0:
            tokens.append((match.start(), token))
        if depth < 0:
            raise UnreadableError(text)
    if depth or matrices:
        raise UnreadableError(text)
    return tokens


def _closes(text: str, position: int) -> bool:
    rest = text[position:].lstrip()
    return not rest or rest.startswith((",", r"\cup", "∪", r"\text", ")", r"\}"))


def balanced(inside: str) -> bool:
    """Return whether every bracket of a text closes in it."""
    try:
        top_level(inside)
    except UnreadableError:
        return False
    return True


def inside_braces(text: str) -> str | None:
    r"""Return what stands in the `\{…\}` around all of a text; None without them."""
    inside = re.fullmatch(r"\\(?:\{|lbrace)(.*)\\(?:\}|rbrace)", text, re.DOTALL)
    return inside[1] if inside and balanced(inside[1]) else None


def unwrapped(text: str) -> str:
    r"""Return a text without `{…}` around all of it."""
    while text.startswith("{") and text.endswith("}") and balanced(text[1:-1]):
        text = text[1:-1].strip()
    return text
