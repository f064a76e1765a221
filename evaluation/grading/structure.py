r"""Structure: what an answer is made of, read from its text.

An answer is a value, several values (a list, a set in braces, a tuple in brackets), a region of the reals (an interval,
an inequality, unions of them), a ratio, or an equation. `(1,2)` is a pair or an interval, whichever
the other answer is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import TypeAlias

from evaluation.grading.brackets import balanced, inside_braces, split, top_level, unwrapped
from evaluation.grading.formula import UnreadableError
from evaluation.grading.regions import INFINITE, Piece, common, end, merged, refused

_OR = (r"\text{or}", r"\lor", r"\vee", "or")
_AND = (r"\text{and}", r"\land", r"\wedge", "and")
_RELATIONS = {
    "=": "=",
    r"\approx": "=",
    "<": "<",
    r"\lt": "<",
    ">": ">",
    r"\gt": ">",
    r"\le": "<=",
    r"\leq": "<=",
    r"\leqslant": "<=",
    r"\ge": ">=",
    r"\geq": ">=",
    r"\geqslant": ">=",
    r"\ne": "!=",
    r"\neq": "!=",
}
TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'*(?:\^\{-1\})?(?:\([\w, .-]*\))?"  # x, x_1, \theta, AB, f'(x), f^{-1}(2)
    r"|\|[A-Z]+\||\\(?:angle|overline|triangle)\s*\{?[A-Z]+\}?|m?\\angle\s*[A-Z]+|\\text\{[^{}]*\}"
)
_REALS = re.compile(r"\\(?:mathbb|mathbf|Bbb)\s*\{?R\}?")
_REALS_IN_WORDS = {"allrealnumbers", "allreals", "therealnumbers", "realnumbers"}
_NOTHING = {r"\emptyset", r"\varnothing", r"\{\}", "∅"}
_NOTHING_IN_WORDS = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset", "theemptyset"}
_CLOCK = re.compile(r"\d{1,2}:\d\d")


@dataclass(frozen=True)
class Value:
    """A formula, or a word in `\text{…}`."""

    text: str


@dataclass(frozen=True)
class Several:
    """Values in a "list", a "set" in braces, a "ratio", or a tuple, whose kind is its two brackets."""

    kind: str
    members: "tuple[Node, ...]"


@dataclass(frozen=True)
class Region:
    """A union of intervals; `variable` is what it was said of, if anything. Without a piece it is the empty set."""

    pieces: tuple[Piece, ...]
    variable: str = ""


@dataclass(frozen=True)
class Relation:
    """Sides with `=`, `<=` and so on between them, that are no interval."""

    sides: tuple[str, ...]
    signs: tuple[str, ...]


Node: TypeAlias = Value | Several | Region | Relation


def read_structure(text: str) -> Node:
    """Return what a LaTeX answer states; UnreadableError when that cannot be told."""
    text = unwrapped(text.strip())
    if not text:
        raise UnreadableError(text)
    if text in _NOTHING or _letters_of(text) in _NOTHING_IN_WORDS:
        return Region(())
    if _REALS.fullmatch(text) or _letters_of(text) in _REALS_IN_WORDS:
        return Region((Piece(f"-{INFINITE}", INFINITE, False, False),))
    alternatives = [part.removesuffix(",") for part in split(text, _OR)]
    if len(alternatives) > 1:
        return _joined([read_structure(part) for part in alternatives])
    both = [part.removesuffix(",") for part in split(text, _AND)]
    if len(both) > 1:
        return _both([read_structure(part) for part in both])
    parts = split(text, (",", ";"))
    if len(parts) > 1:
        return _listed(_members(parts))
    unions = split(text, (r"\cup", "∪"))
    if len(unions) > 1:
        return _union([read_structure(part) for part in unions])
    without = split(text, (r"\setminus", r"\backslash"))
    if len(without) == 2 and _REALS.fullmatch(without[0]):
        return _all_but(read_structure(without[1]))
    related = _related(text)
    if related is not None:
        return related
    return _enclosed(text)


def _enclosed(text: str) -> Node:
    inside = inside_braces(text)
    if inside is not None:
        condition = re.fullmatch(r"(.*?)(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:)(.*)", inside, re.DOTALL)
        if condition and re.fullmatch(r"[A-Za-z](?:\s*\\in\s*" + _REALS.pattern + ")?", condition[1].strip()):
            region = read_structure(condition[2])
            if isinstance(region, Region) and region.variable in {"", condition[1].strip()[0]}:
                return Region(region.pieces)
            return refused(text)
        members = _members(split(inside, (",", ";"))) if inside.strip() else []
        return Several("set", _flat(members))
    ends = re.fullmatch(r"(\(|\[|\]|\\langle)(.*)(\)|\]|\[|\\rangle)", text, re.DOTALL)
    if ends:
        members_text = split(ends[2], (",", ";")) if balanced(ends[2]) else []
        if len(members_text) > 1:
            kind = ends[1].replace("\\langle", "<") + ends[3].replace("\\rangle", ">")
            # ]0,1[ is (0,1), and infinity is in no interval.
            kind = {"]": "("}.get(kind[0], kind[0]) + {"[": ")"}.get(kind[1], kind[1])
            if kind not in {"()", "[]", "[)", "(]", "<>"}:
                return refused(text)
            return Several(kind, tuple(_members(members_text)))
    ratio = split(text, (":",))
    if len(ratio) > 1:
        if _CLOCK.fullmatch(text):
            hour, minute = text.split(":")
            return Value(f"\\text{{clock {hour.lstrip('0') or '0'}:{minute}}}")
        return Several("ratio", tuple(Value(part) for part in ratio))
    signs = re.findall(r"\\(?:pm|mp)(?![A-Za-z])|±", text)
    if len(signs) == 1:
        return Several("list", (Value(text.replace(signs[0], "+", 1)), Value(text.replace(signs[0], "-", 1))))
    words = re.fullmatch(r"\\text\{([^{}]*,[^{}]*)\}", text)
    if words:
        return Several("list", tuple(Value(f"\\text{{{part.strip()}}}") for part in words[1].split(",")))
    return Value(text)


def _related(text: str) -> Node | None:
    sides, signs = _relation(text)
    if not signs:
        return None
    if "!=" in signs and len(sides) == 2:
        variable, other = (sides[0], sides[1]) if VARIABLE.fullmatch(sides[0]) else (sides[1], sides[0])
        if VARIABLE.fullmatch(variable):
            region = _all_but(Value(other))
            return Region(region.pieces, variable) if isinstance(region, Region) else region
    if {*signs} <= {"<", "<="} or {*signs} <= {">", ">="}:
        if signs[0][0] == ">":
            sides, signs = sides[::-1], [TURNED[sign] for sign in signs[::-1]]
        if len(sides) == 3 and VARIABLE.fullmatch(sides[1]):
            return Region((Piece(sides[0], sides[2], signs[0] == "<=", signs[1] == "<="),), sides[1])
        if len(sides) == 2 and (absolute := _absolute(sides, closed=signs[0] == "<=")):
            return absolute
        if len(sides) == 2 and VARIABLE.fullmatch(sides[0]) and not _mentions(sides[1], sides[0]):
            return Region((Piece(f"-{INFINITE}", sides[1], False, signs[0] == "<="),), sides[0])
        if len(sides) == 2 and VARIABLE.fullmatch(sides[1]) and not _mentions(sides[0], sides[1]):
            return Region((Piece(sides[0], INFINITE, signs[0] == "<=", False),), sides[1])
    pair = re.fullmatch(r"\(\s*([A-Za-z](?:\s*,\s*[A-Za-z])+)\s*\)", sides[0])
    if pair and len(sides) == 2 and signs == ["="]:
        names = [name.strip() for name in pair[1].split(",")]
        return read_structure(sides[1]) if names == sorted({*names}) else refused(text)
    if signs == ["="] and _NAME.fullmatch(sides[0]):
        two = _enclosed(sides[1])
        if isinstance(two, Several) and two.kind == "list":
            return Several("list", tuple(Relation((sides[0], str(_text(each))), ("=",)) for each in two.members))
    return Relation(tuple(sides), tuple(signs))


def _absolute(sides: Sequence[str], *, closed: bool) -> Region | None:
    """Return the region of |x| < a or a < |x|, a above 0; None when the sides are anything else."""
    bars = [re.fullmatch(rf"(?:\||\\lvert\s*)({VARIABLE.pattern})(?:\||\s*\\rvert)", side) for side in sides]
    if bool(bars[0]) == bool(bars[1]) or end(sides[bars[1] is None]) <= 0:
        return None
    if bars[0]:
        return Region((Piece(f"-({sides[1]})", sides[1], closed, closed),), bars[0][1])
    outside = Piece(f"-{INFINITE}", f"-({sides[0]})", False, closed), Piece(sides[0], INFINITE, closed, False)
    assert bars[1] is not None
    return Region(outside, bars[1][1])


def _text(node: Node) -> str:
    return node.text if isinstance(node, Value) else refused(str(node))


def _mentions(text: str, variable: str) -> bool:
    return re.search(rf"(?<![\\A-Za-z]){re.escape(variable)}(?![A-Za-z])", text) is not None


def _relation(text: str) -> tuple[list[str], list[str]]:
    """Return the sides of a relation, stripped, and the signs between them; no sign when it is none."""
    sides, signs, start = [], [], 0
    for position, token in top_level(text):
        if token in _RELATIONS:
            sides.append(text[start:position].strip())
            signs.append(_RELATIONS[token])
            start = position + len(token)
    sides.append(text[start:].strip())
    if signs and not all(sides):
        raise UnreadableError(text)
    return sides, signs


def _letters_of(text: str) -> str:
    words = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return re.sub(r"[^a-z]", "", words[1].lower()) if words else ""


def _members(parts: Sequence[str]) -> list[Node]:
    # 1,000 in brackets is a number or two.
    if any(re.fullmatch(r"0\d+", part) for part in parts):
        raise UnreadableError(str(parts))
    return [read_structure(part) for part in parts]


def _flat(nodes: Sequence[Node]) -> tuple[Node, ...]:
    return tuple(
        member
        for node in nodes
        for member in (node.members if isinstance(node, Several) and node.kind == "list" else (node,))
    )


def _listed(nodes: Sequence[Node]) -> Node:
    """Return a list; intervals with commas between them are none, a union states its sign."""
    return Several("list", _flat(nodes))


def _joined(nodes: Sequence[Node]) -> Node:
    if all(isinstance(node, Region) for node in nodes):
        return _union(nodes)
    if len({name[:1] for name in map(name_of, nodes)}) > 1:
        # x=1 or y=2
        raise UnreadableError(str(nodes))
    return _listed(nodes)


def _both(nodes: Sequence[Node]) -> Node:
    regions = [node for node in nodes if isinstance(node, Region)]
    if len(regions) == len(nodes):
        if len({region.variable for region in regions}) != 1 or not regions[0].variable:
            return _listed(nodes)
        return Region(merged(reduce(common, (region.pieces for region in regions))), regions[0].variable)
    return _listed(nodes)


def _union(nodes: Sequence[Node]) -> Node:
    regions = [as_region(node, Region((Piece("", "", False, False),))) for node in nodes]
    pieces: list[Piece] = []
    variables = set()
    for region in regions:
        if not isinstance(region, Region):
            # The union of two sets of numbers, or of what is no interval.
            return refused(str(nodes))
        pieces += region.pieces
        variables.add(region.variable)
    if len(variables) > 1:
        return refused(str(nodes))
    return Region(merged(pieces), variables.pop())


def _all_but(node: Node) -> Node:
    """Return the reals without a number, or without those of a list or set."""
    members = node.members if isinstance(node, Several) and node.kind in {"list", "set"} else (node,)
    points = sorted((_text(member) for member in members), key=end)
    ends = [f"-{INFINITE}", *points, INFINITE]
    return Region(tuple(Piece(*each, False, False) for each in pairwise(ends)))


def as_region(node: Node, other: Region) -> Node:
    """Return the region that a pair or a set may be read as, since the other is one; else the node."""
    if isinstance(node, Several) and len(node.members) == 2 and len(node.kind) == 2:
        low, high = node.members
        if isinstance(low, Value) and isinstance(high, Value) and (other.pieces or node.kind != "()"):
            return Region((Piece(low.text, high.text, node.kind[0] == "[", node.kind[1] == "]"),))
    if isinstance(node, Several) and node.kind == "set" and all(isinstance(each, Value) for each in node.members):
        return Region(
            tuple(Piece(each.text, each.text, True, True) for each in node.members if isinstance(each, Value))
        )
    return node


def unnamed(relation: Relation) -> Node:
    r"""Return what an equation says a name is: 5 for `x = 5` and `5 = x`, the relation itself when it has no name."""
    if {*relation.signs} != {"="}:
        return relation
    sides = relation.sides
    while len(sides) > 1 and _NAME.fullmatch(sides[0]):
        sides = sides[1:]
    if len(sides) == len(relation.sides) and len(sides) == 2 and _NAME.fullmatch(sides[1]):
        sides = sides[:1]
    return read_structure(sides[0]) if len(sides) == 1 else Relation(sides, relation.signs[: len(sides) - 1])


def name_of(node: Node) -> str:
    """Return x of `x = …`; "" of anything else."""
    named = isinstance(node, Relation) and node.signs == ("=",) and VARIABLE.fullmatch(node.sides[0])
    return node.sides[0] if isinstance(node, Relation) and named else ""
