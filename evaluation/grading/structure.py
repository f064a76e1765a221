r"""Structure: what an answer is made of, and whether two answers are the same.

An answer is a value, several values (a list, a set in braces, a tuple in brackets), a region of the reals (an interval,
an inequality, unions of them), a ratio, or an equation. `(1,2)` is a pair or an interval, whichever the other is.
Formulas are compared by value; a tuple and what stands for one in the order of its names (`x=1,y=2`) entry by entry;
lists and sets whatever their order, and entry for entry: 5,5 is not 5.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from itertools import pairwise
from typing import NoReturn, TypeAlias

from evaluation.grading import notation
from evaluation.grading.formula import (
    Expression,
    UnreadableError,
    constant_ratio,
    number,
    read_formula,
    same_value,
)

ELLIPSES = {r"\ldots", r"\dots", r"\cdots", "...", "…"}
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
_TURNED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_VARIABLE = re.compile(r"(?:[A-Za-z]|\\[a-z]+)(?:_(?:\w|\{\w+\}))?")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_(?:\w|\{\w+\}))?'*(?:\^\{-1\})?(?:\([\w, .-]*\))?"  # x, x_1, \theta, AB, f'(x), f^{-1}(2)
    r"|\|[A-Z]+\||\\(?:angle|overline|triangle)\s*\{?[A-Z]+\}?|m?\\angle\s*[A-Z]+|\\text\{[^{}]*\}"
)
_INFINITE = "\\infty"
_REALS = re.compile(r"\\(?:mathbb|mathbf|Bbb)\s*\{?R\}?")
_REALS_IN_WORDS = {"allrealnumbers", "allreals", "therealnumbers", "realnumbers"}
_NOTHING = {r"\emptyset", r"\varnothing", r"\{\}", "∅"}
_NOTHING_IN_WORDS = {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset", "theemptyset"}
_CLOCK = re.compile(r"\d{1,2}:\d\d")
_BASE = re.compile(r"\(?(\d[\dA-Z]*|[A-Z]*\d[\dA-Z]*)\)?_(?:(\d)|\{\s*(\d+)\s*\})")
_LETTERS = re.compile(r"[A-Za-z]{3,}")


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
class Piece:
    """An interval, by the text of its ends."""

    low: str
    high: str
    low_closed: bool
    high_closed: bool


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


def same_answer(answer: str, gold: str) -> bool:
    """Return whether two LaTeX answers, as `notation.plain` returns them, are the same answer."""
    try:
        ours, theirs = _read(answer), _read(gold)
        # A letter i is a number only where the right answer is complex.
        return _Judge(imaginary=_has_imaginary(gold)).same(_alone(ours, theirs), _alone(theirs, ours))
    except UnreadableError:
        return False


@dataclass(frozen=True)
class _Judge:
    imaginary: bool

    def same(self, ours: Node, theirs: Node) -> bool:
        """Return whether a node is the right one."""
        ours, theirs = _alike(ours, theirs)
        match ours, theirs:
            case Region(), Region():
                return self._same_region(ours, theirs)
            case Several(), Several():
                return self._same_several(ours, theirs)
            case Relation(), Relation():
                return self._same_relation(ours, theirs)
            case Value(), Value():
                return self._same_value(ours.text, theirs.text)
            # 2+2=4 is 4, and a ratio its quotient.
            case Relation(), Value() if {*ours.signs} == {"="}:
                return all(self._same_value(side, theirs.text) for side in ours.sides)
            case (Several("ratio", (Value() as over, Value() as under)), Value()) | (
                Value(),
                Several("ratio", (Value() as over, Value() as under)),
            ):
                value = ours if isinstance(ours, Value) else theirs
                assert isinstance(value, Value)
                return self._same_value(f"({over.text})/({under.text})", value.text)
        return False

    def _same_several(self, ours: Several, theirs: Several) -> bool:
        if len(ours.members) != len(theirs.members):
            return False
        kinds = {ours.kind, theirs.kind}
        if kinds == {"ratio"}:
            return self._same_ratio(ours.members, theirs.members)
        ordered = kinds not in ({"list"}, {"set"}, {"list", "set"})
        if ordered and len(kinds) > 1:
            return False
        if ordered or any(_is_ellipsis(member) for member in (*ours.members, *theirs.members)):
            return all(self.same(one, other) for one, other in zip(ours.members, theirs.members, strict=True))
        return self._matched(ours.members, theirs.members)

    def _matched(self, ours: Sequence[Node], theirs: Sequence[Node]) -> bool:
        # Equality is transitive, so what is matched first need not be given up again.
        left = [*theirs]
        for one in ours:
            partner = next((place for place, other in enumerate(left) if self.same(one, other)), None)
            if partner is None:
                return False
            del left[partner]
        return not left

    def _same_ratio(self, ours: Sequence[Node], theirs: Sequence[Node]) -> bool:
        texts = [[node.text for node in nodes if isinstance(node, Value)] for nodes in (ours, theirs)]
        if len(texts[0]) != len(ours) or len(texts[1]) != len(theirs):
            return False
        return all(
            self._same_value(f"({one})({texts[1][0]})", f"({other})({texts[0][0]})")
            for one, other in zip(*texts, strict=True)
        )

    def _same_region(self, ours: Region, theirs: Region) -> bool:
        if ours.variable and theirs.variable and ours.variable != theirs.variable:
            return False
        left = [*theirs.pieces]
        for one in ours.pieces:
            partner = next((place for place, other in enumerate(left) if self._same_piece(one, other)), None)
            if partner is None:
                return False
            del left[partner]
        return not left

    def _same_piece(self, one: Piece, other: Piece) -> bool:
        return (
            (one.low_closed, one.high_closed) == (other.low_closed, other.high_closed)
            and self._same_value(one.low, other.low)
            and self._same_value(one.high, other.high)
        )

    def _same_relation(self, ours: Relation, theirs: Relation) -> bool:
        if len(ours.sides) != 2 or len(theirs.sides) != 2:
            return False
        if not all(notation.same_units(one, other) for one, other in zip(ours.sides, theirs.sides, strict=True)):
            return False
        ratio = constant_ratio(self._difference(ours), self._difference(theirs))
        if ratio is None:
            return False
        our_sign, their_sign = ours.signs[0], theirs.signs[0]
        # 2x=10 does not say yet what x is.
        if self._is_solved(theirs) and not self._is_solved(ours):
            return False
        if our_sign in {"=", "!="}:
            return our_sign == their_sign
        return bool(ratio.is_real) and (our_sign if ratio > 0 else _TURNED[our_sign]) == their_sign

    def _is_solved(self, relation: Relation) -> bool:
        return any(
            _VARIABLE.fullmatch(one) and not self._formula(notation.unitless(other)).free_symbols
            for one, other in (relation.sides, relation.sides[::-1])
        )

    def _difference(self, relation: Relation) -> Expression:
        one, other = (self._formula(notation.unitless(side)) for side in relation.sides)
        try:
            return one - other
        except TypeError as error:
            raise UnreadableError(str(relation)) from error

    def _same_value(self, ours: str, theirs: str) -> bool:
        if ours == theirs or (ours in ELLIPSES and theirs in ELLIPSES):
            return True
        if (said := notation.same_text(ours, theirs)) is not None:
            return said
        if (same := notation.same_decimal(ours, theirs)) is not None:
            return same
        if _BASE.fullmatch(ours) or _BASE.fullmatch(theirs):
            return _same_in_base(ours, theirs)
        # A word, whose letters are no factors.
        if _LETTERS.fullmatch(ours) and _LETTERS.fullmatch(theirs):
            return False
        if not notation.same_units(ours, theirs):
            return False
        bare = self._formula(notation.unitless(ours)), self._formula(notation.unitless(theirs))
        if not (notation.has_factor(ours) or notation.has_factor(theirs)):
            return same_value(*bare)
        # 50 % is 0.5 and 180 degrees are pi; the sign may be missing, but 0.5 % is not 0.5.
        missed = "%" in ours and "%" not in theirs and abs(number(bare[1]) or 0) < 1
        return (same_value(*bare) and not missed) or same_value(
            self._formula(notation.with_factors(ours)), self._formula(notation.with_factors(theirs))
        )

    def _formula(self, text: str) -> Expression:
        return _formula(text, self.imaginary)


@lru_cache(maxsize=1000)
def _formula(text: str, imaginary: bool) -> Expression:
    return read_formula(text, imaginary=imaginary)


def _alone(node: Node, other: Node) -> Node:
    """Return the one member of a set that stands against a value or a tuple, {5} and 5, else the node."""
    single = isinstance(node, Several) and node.kind == "set" and len(node.members) == 1
    against = isinstance(other, (Value, Relation)) or (isinstance(other, Several) and other.kind == "()")
    return node.members[0] if isinstance(node, Several) and single and against else node


def _alike(ours: Node, theirs: Node) -> tuple[Node, Node]:
    """Return both nodes, one that could be read as what the other is read as that."""
    if isinstance(ours, Relation) != isinstance(theirs, Relation):
        ours, theirs = (_unnamed(node) if isinstance(node, Relation) else node for node in (ours, theirs))
    if isinstance(ours, Region):
        return ours, _as_region(theirs, ours)
    if isinstance(theirs, Region):
        return _as_region(ours, theirs), theirs
    if isinstance(ours, Several) and isinstance(theirs, Several):
        return _as_several(ours, theirs, bare=True), _as_several(theirs, ours, bare=False)
    return ours, theirs


def _as_region(node: Node, other: Region) -> Node:
    if isinstance(node, Several) and len(node.members) == 2 and len(node.kind) == 2:
        low, high = node.members
        if isinstance(low, Value) and isinstance(high, Value) and (other.pieces or node.kind != "()"):
            return Region((Piece(low.text, high.text, node.kind[0] == "[", node.kind[1] == "]"),))
    if isinstance(node, Several) and node.kind == "set" and all(isinstance(each, Value) for each in node.members):
        return Region(
            tuple(Piece(each.text, each.text, True, True) for each in node.members if isinstance(each, Value))
        )
    return node


def _unnamed(relation: Relation) -> Node:
    r"""Return what an equation says a name is: 5 for `x = 5` and `5 = x`, the relation itself when it has no name."""
    if {*relation.signs} != {"="}:
        return relation
    sides = relation.sides
    while len(sides) > 1 and _NAME.fullmatch(sides[0]):
        sides = sides[1:]
    if len(sides) == len(relation.sides) and len(sides) == 2 and _NAME.fullmatch(sides[1]):
        sides = sides[:1]
    return _read(sides[0]) if len(sides) == 1 else Relation(sides, relation.signs[: len(sides) - 1])


def _as_several(node: Several, other: Several, *, bare: bool) -> Several:
    """Return several values as the other has them: without the names of a list, or as the tuple that it stands for.

    A `bare` list may stand for a tuple without names.
    """
    if node.kind not in {"list", "set"}:
        return node
    named = [_name(member) for member in node.members]
    if not all(named):
        # A list has no brackets to say that it is an interval, so it is none where the other could be one.
        if bare and node.kind == "list" and other.kind == "()" and not any(named) and not _could_be_interval(other):
            return Several("()", node.members)
        return node
    if all(map(_name, other.members)):
        return node
    values = tuple(_unnamed(member) if isinstance(member, Relation) else member for member in node.members)
    letters = [re.sub(r"_.*", "", name) for name in named]
    if len({*letters}) == 1:
        return Several(node.kind, values)
    order = sorted(range(len(named)), key=lambda place: named[place])
    plain = all(re.fullmatch("[A-Za-z]", name) for name in named)
    if len({*named}) < len(named) or (not plain and order != [*range(len(named))]) or node.kind == "set":
        return node
    ordered = tuple(values[place] for place in (order if plain else range(len(order))))
    return Several("()", ordered)


def _could_be_interval(several: Several) -> bool:
    if len(several.members) != 2:
        return False
    ends = []
    for member in several.members:
        try:
            ends.append(number(read_formula(member.text, imaginary=False)) if isinstance(member, Value) else None)
        except UnreadableError:
            return True
    low, high = ends
    return low is None or high is None or low < high


def _name(node: Node) -> str:
    named = isinstance(node, Relation) and node.signs == ("=",) and _VARIABLE.fullmatch(node.sides[0])
    return node.sides[0] if isinstance(node, Relation) and named else ""


def _same_in_base(ours: str, theirs: str) -> bool:
    """Return whether numbers in a base other than ten are the same digits; the base may be left out of an answer."""
    our_digits, our_base = _in_base(ours)
    their_digits, their_base = _in_base(theirs)
    return our_digits == their_digits and (our_base in {their_base, ""} or (our_base, their_base) == ("10", ""))


def _in_base(text: str) -> tuple[str, str]:
    based = _BASE.fullmatch(text)
    return (based[1], based[2] or based[3]) if based else (text, "")


def _has_imaginary(gold: str) -> bool:
    bare = re.sub(r"\\(?:text|mathrm|textbf)\{[^{}]*\}|\\[A-Za-z]+|_\{[^{}]*\}|_\w", " ", gold)
    return "i" in bare and "=" not in bare and not re.search(r"[A-Za-z]{3,}", bare)


def _is_ellipsis(node: Node) -> bool:
    return isinstance(node, Value) and node.text in ELLIPSES


def _read(text: str) -> Node:
    text = _unwrapped(text.strip())
    if not text:
        raise UnreadableError(text)
    if text in _NOTHING or _letters_of(text) in _NOTHING_IN_WORDS:
        return Region(())
    if _REALS.fullmatch(text) or _letters_of(text) in _REALS_IN_WORDS:
        return Region((Piece(f"-{_INFINITE}", _INFINITE, False, False),))
    alternatives = [part.removesuffix(",") for part in _split(text, _OR)]
    if len(alternatives) > 1:
        return _joined([_read(part) for part in alternatives])
    both = [part.removesuffix(",") for part in _split(text, _AND)]
    if len(both) > 1:
        return _both([_read(part) for part in both])
    parts = _split(text, (",", ";"))
    if len(parts) > 1:
        return _listed(_members(parts))
    unions = _split(text, (r"\cup", "∪"))
    if len(unions) > 1:
        return _union([_read(part) for part in unions])
    without = _split(text, (r"\setminus", r"\backslash"))
    if len(without) == 2 and _REALS.fullmatch(without[0]):
        return _all_but(_read(without[1]))
    related = _related(text)
    if related is not None:
        return related
    return _enclosed(text)


def _enclosed(text: str) -> Node:
    inside = _inside_braces(text)
    if inside is not None:
        condition = re.fullmatch(r"(.*?)(?:\\mid(?![A-Za-z])|\\vert(?![A-Za-z])|\||:)(.*)", inside, re.DOTALL)
        if condition and re.fullmatch(r"[A-Za-z](?:\s*\\in\s*" + _REALS.pattern + ")?", condition[1].strip()):
            region = _read(condition[2])
            if isinstance(region, Region) and region.variable in {"", condition[1].strip()[0]}:
                return Region(region.pieces)
            return _refused(text)
        members = _members(_split(inside, (",", ";"))) if inside.strip() else []
        return Several("set", _flat(members))
    ends = re.fullmatch(r"(\(|\[|\]|\\langle)(.*)(\)|\]|\[|\\rangle)", text, re.DOTALL)
    if ends:
        members_text = _split(ends[2], (",", ";")) if _balanced(ends[2]) else []
        if len(members_text) > 1:
            kind = ends[1].replace("\\langle", "<") + ends[3].replace("\\rangle", ">")
            # ]0,1[ is (0,1), and infinity is in no interval.
            kind = {"]": "("}.get(kind[0], kind[0]) + {"[": ")"}.get(kind[1], kind[1])
            if kind not in {"()", "[]", "[)", "(]", "<>"}:
                return _refused(text)
            return Several(kind, tuple(_members(members_text)))
    ratio = _split(text, (":",))
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
        variable, other = (sides[0], sides[1]) if _VARIABLE.fullmatch(sides[0]) else (sides[1], sides[0])
        if _VARIABLE.fullmatch(variable):
            region = _all_but(Value(other))
            return Region(region.pieces, variable) if isinstance(region, Region) else region
    if {*signs} <= {"<", "<="} or {*signs} <= {">", ">="}:
        if signs[0][0] == ">":
            sides, signs = sides[::-1], [_TURNED[sign] for sign in signs[::-1]]
        if len(sides) == 3 and _VARIABLE.fullmatch(sides[1]):
            return Region((Piece(sides[0], sides[2], signs[0] == "<=", signs[1] == "<="),), sides[1])
        if len(sides) == 2 and (absolute := _absolute(sides, closed=signs[0] == "<=")):
            return absolute
        if len(sides) == 2 and _VARIABLE.fullmatch(sides[0]) and not _mentions(sides[1], sides[0]):
            return Region((Piece(f"-{_INFINITE}", sides[1], False, signs[0] == "<="),), sides[0])
        if len(sides) == 2 and _VARIABLE.fullmatch(sides[1]) and not _mentions(sides[0], sides[1]):
            return Region((Piece(sides[0], _INFINITE, signs[0] == "<=", False),), sides[1])
    pair = re.fullmatch(r"\(\s*([A-Za-z](?:\s*,\s*[A-Za-z])+)\s*\)", sides[0])
    if pair and len(sides) == 2 and signs == ["="]:
        names = [name.strip() for name in pair[1].split(",")]
        return _read(sides[1]) if names == sorted({*names}) else _refused(text)
    if signs == ["="] and _NAME.fullmatch(sides[0]):
        two = _enclosed(sides[1])
        if isinstance(two, Several) and two.kind == "list":
            return Several("list", tuple(Relation((sides[0], str(_text(each))), ("=",)) for each in two.members))
    return Relation(tuple(sides), tuple(signs))


def _absolute(sides: Sequence[str], *, closed: bool) -> Region | None:
    """Return the region of |x| < a or a < |x|, a above 0; None when the sides are anything else."""
    bars = [re.fullmatch(rf"(?:\||\\lvert\s*)({_VARIABLE.pattern})(?:\||\s*\\rvert)", side) for side in sides]
    if bool(bars[0]) == bool(bars[1]) or _end(sides[bars[1] is None]) <= 0:
        return None
    if bars[0]:
        return Region((Piece(f"-({sides[1]})", sides[1], closed, closed),), bars[0][1])
    outside = Piece(f"-{_INFINITE}", f"-({sides[0]})", False, closed), Piece(sides[0], _INFINITE, closed, False)
    assert bars[1] is not None
    return Region(outside, bars[1][1])


def _text(node: Node) -> str:
    return node.text if isinstance(node, Value) else _refused(str(node))


def _mentions(text: str, variable: str) -> bool:
    return re.search(rf"(?<![\\A-Za-z]){re.escape(variable)}(?![A-Za-z])", text) is not None


def _relation(text: str) -> tuple[list[str], list[str]]:
    """Return the sides of a relation, stripped, and the signs between them; no sign when it is none."""
    sides, signs, start = [], [], 0
    for position, token in _top_level(text):
        if token in _RELATIONS:
            sides.append(text[start:position].strip())
            signs.append(_RELATIONS[token])
            start = position + len(token)
    sides.append(text[start:].strip())
    if signs and not all(sides):
        raise UnreadableError(text)
    return sides, signs


def _split(text: str, separators: Sequence[str]) -> list[str]:
    parts, start = [], 0
    for position, token in _top_level(text):
        if token in separators and position >= start:
            parts.append(text[start:position].strip())
            start = position + len(token)
    return [*parts, text[start:].strip()]


_TOP = re.compile(
    r"\\text\{(?:or|and)\}|\\[A-Za-z]+|\\.|(?<![A-Za-z\\])(?:or|and)(?![A-Za-z])|\.\.\.|[^\s\\]", re.DOTALL
)


def _top_level(text: str) -> list[tuple[int, str]]:
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


def _balanced(inside: str) -> bool:
    try:
        _top_level(inside)
    except UnreadableError:
        return False
    return True


def _inside_braces(text: str) -> str | None:
    inside = re.fullmatch(r"\\(?:\{|lbrace)(.*)\\(?:\}|rbrace)", text, re.DOTALL)
    return inside[1] if inside and _balanced(inside[1]) else None


def _unwrapped(text: str) -> str:
    r"""Return a text without `{…}` around all of it."""
    while text.startswith("{") and text.endswith("}") and _balanced(text[1:-1]):
        text = text[1:-1].strip()
    return text


def _letters_of(text: str) -> str:
    words = re.fullmatch(r"\\text\{([^{}]*)\}", text)
    return re.sub(r"[^a-z]", "", words[1].lower()) if words else ""


def _members(parts: Sequence[str]) -> list[Node]:
    # 1,000 in brackets is a number or two.
    if any(re.fullmatch(r"0\d+", part) for part in parts):
        raise UnreadableError(str(parts))
    return [_read(part) for part in parts]


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
    if len({name[:1] for name in map(_name, nodes)}) > 1:
        # x=1 or y=2
        raise UnreadableError(str(nodes))
    return _listed(nodes)


def _both(nodes: Sequence[Node]) -> Node:
    regions = [node for node in nodes if isinstance(node, Region)]
    if len(regions) == len(nodes):
        if len({region.variable for region in regions}) != 1 or not regions[0].variable:
            return _listed(nodes)
        return Region(_merged(reduce(_common, (region.pieces for region in regions))), regions[0].variable)
    return _listed(nodes)


def _union(nodes: Sequence[Node]) -> Node:
    regions = [_as_region(node, Region((Piece("", "", False, False),))) for node in nodes]
    pieces: list[Piece] = []
    variables = set()
    for region in regions:
        if not isinstance(region, Region):
            # The union of two sets of numbers, or of what is no interval.
            return _refused(str(nodes))
        pieces += region.pieces
        variables.add(region.variable)
    if len(variables) > 1:
        return _refused(str(nodes))
    return Region(_merged(pieces), variables.pop())


def _all_but(node: Node) -> Node:
    """Return the reals without a number, or without those of a list or set."""
    members = node.members if isinstance(node, Several) and node.kind in {"list", "set"} else (node,)
    points = sorted((_text(member) for member in members), key=_end)
    ends = [f"-{_INFINITE}", *points, _INFINITE]
    return Region(tuple(Piece(*each, False, False) for each in pairwise(ends)))


def _end(text: str) -> float:
    value = number(_formula(notation.unitless(text), False))
    return _refused(text) if value is None else value


def _ends(piece: Piece) -> tuple[float, float]:
    return _end(piece.low), _end(piece.high)


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return a union's pieces in order, those that touch as one; as they are when an end is no number."""
    try:
        ordered = sorted(pieces, key=lambda piece: (_end(piece.low), not piece.low_closed))
    except UnreadableError:
        return tuple(pieces)
    merged: list[Piece] = []
    for piece in ordered:
        last = merged[-1] if merged else None
        if last is None or not _touch(last, piece):
            merged.append(piece)
        else:
            further = max(last, piece, key=lambda each: (_end(each.high), each.high_closed))
            merged[-1] = Piece(last.low, further.high, last.low_closed, further.high_closed)
    return tuple(merged)


def _touch(one: Piece, other: Piece) -> bool:
    """Return whether a piece begins within the one before it, or where that ends and one of them has the point."""
    start, end = _end(other.low), _end(one.high)
    return start < end or (start == end and (other.low_closed or one.high_closed))


def _common(ours: Sequence[Piece], theirs: Sequence[Piece]) -> tuple[Piece, ...]:
    """Return what two unions have in common; UnreadableError when an end is no number."""
    common = []
    for one in ours:
        for other in theirs:
            low = max(one, other, key=lambda piece: (_end(piece.low), not piece.low_closed))
            high = min(one, other, key=lambda piece: (_end(piece.high), piece.high_closed))
            piece = Piece(low.low, high.high, low.low_closed, high.high_closed)
            start, end = _ends(piece)
            if start < end or (start == end and piece.low_closed and piece.high_closed):
                common.append(piece)
    return tuple(common)


def _refused(text: str) -> NoReturn:
    raise UnreadableError(text)
