"""Regions: unions of intervals of the reals, whose ends are formulas as texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from evaluation.grading import notation
from evaluation.grading.formula import UnreadableError, number, read_formula

INFINITE = "\\infty"


@dataclass(frozen=True)
class Piece:
    """An interval, by the text of its ends."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


def end(text: str) -> float:
    """Return an end of an interval as a number; UnreadableError when it is none."""
    value = number(read_formula(notation.unitless(text), imaginary=False))
    return refused(text) if value is None else value


def ends(piece: Piece) -> tuple[float, float]:
    """Return both ends as numbers; UnreadableError when one is none."""
    return end(piece.low), end(piece.high)


def merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return a union's pieces in order, those that touch as one; as they are when an end is no number."""
    try:
        ordered = sorted(pieces, key=lambda piece: (end(piece.low), not piece.low_closed))
    except UnreadableError:
        return tuple(pieces)
    joined: list[Piece] = []
    for piece in ordered:
        last = joined[-1] if joined else None
        if last is None or not _touch(last, piece):
            joined.append(piece)
        else:
            further = max(last, piece, key=lambda each: (end(each.high), each.high_closed))
            joined[-1] = Piece(last.low, further.high, last.low_closed, further.high_closed)
    return tuple(joined)


def _touch(one: Piece, other: Piece) -> bool:
    """Return whether a piece begins within the one before it, or where that ends and one of them has the point."""
    start, stop = end(other.low), end(one.high)
    return start < stop or (start == stop and (other.low_closed or one.high_closed))


def common(ours: Sequence[Piece], theirs: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return what two unions have in common; UnreadableError when an end is no number."""
    shared = []
    for one in ours:
        for other in theirs:
            low = max(one, other, key=lambda piece: (end(piece.low), not piece.low_closed))
            high = min(one, other, key=lambda piece: (end(piece.high), piece.high_closed))
            piece = Piece(low.low, high.high, low.low_closed, high.high_closed)
            start, stop = ends(piece)
            if start < stop or (start == stop and piece.low_closed and piece.high_closed):
                shared.append(piece)
    return tuple(shared)


def refused(text: str) -> NoReturn:
    """Raise UnreadableError, in an expression."""
    raise UnreadableError(text)
