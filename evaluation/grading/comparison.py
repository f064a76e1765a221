"""Comparison: whether two answers are the same.

Formulas are compared by value; a tuple and what stands for one in the order of its names (`x=1,y=2`) entry by entry;
lists and sets whatever their order, and entry for entry: 5,5 is not 5. What can be read in two ways, `(1,2)`, is read
as what the other answer is.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.grading import notation
from evaluation.grading.formula import (
    Expression,
    UnreadableError,
    constant_ratio,
    number,
    read_formula,
    same_value,
)
from evaluation.grading.regions import Piece
from evaluation.grading.structure import (
    TURNED,
    VARIABLE,
    Node,
    Region,
    Relation,
    Several,
    Value,
    as_region,
    name_of,
    read_structure,
    unnamed,
)

_ELLIPSES = {r"\ldots", r"\dots", r"\cdots", "...", "…"}
_BASE = re.compile(r"\(?(\d[\dA-Z]*|[A-Z]*\d[\dA-Z]*)\)?_(?:(\d)|\{\s*(\d+)\s*\})")
_LETTERS = re.compile(r"[A-Za-z]{3,}")


def same_answer(answer: str, gold: str) -> bool:
    """Return whether two LaTeX answers, as `notation.plain` returns them, are the same answer."""
    try:
        ours, theirs = read_structure(answer), read_structure(gold)
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
        return bool(ratio.is_real) and (our_sign if ratio > 0 else TURNED[our_sign]) == their_sign

    def _is_solved(self, relation: Relation) -> bool:
        return any(
            VARIABLE.fullmatch(one) and not self._formula(notation.unitless(other)).free_symbols
            for one, other in (relation.sides, relation.sides[::-1])
        )

    def _difference(self, relation: Relation) -> Expression:
        one, other = (self._formula(notation.unitless(side)) for side in relation.sides)
        try:
            return one - other
        except TypeError as error:
            raise UnreadableError(str(relation)) from error

    def _same_value(self, ours: str, theirs: str) -> bool:
        if ours == theirs or (ours in _ELLIPSES and theirs in _ELLIPSES):
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
        return read_formula(text, imaginary=self.imaginary)


def _alone(node: Node, other: Node) -> Node:
    """Return the one member of a set that stands against a value or a tuple, {5} and 5, else the node."""
    single = isinstance(node, Several) and node.kind == "set" and len(node.members) == 1
    against = isinstance(other, (Value, Relation)) or (isinstance(other, Several) and other.kind == "()")
    return node.members[0] if isinstance(node, Several) and single and against else node


def _alike(ours: Node, theirs: Node) -> tuple[Node, Node]:
    """Return both nodes, one that could be read as what the other is read as that."""
    if isinstance(ours, Relation) != isinstance(theirs, Relation):
        ours, theirs = (unnamed(node) if isinstance(node, Relation) else node for node in (ours, theirs))
    if isinstance(ours, Region):
        return ours, as_region(theirs, ours)
    if isinstance(theirs, Region):
        return as_region(ours, theirs), theirs
    if isinstance(ours, Several) and isinstance(theirs, Several):
        return _as_several(ours, theirs, bare=True), _as_several(theirs, ours, bare=False)
    return ours, theirs


def _as_several(node: Several, other: Several, *, bare: bool) -> Several:
    """Return several values as the other has them: without the names of a list, or as the tuple that it stands for.

    A `bare` list may stand for a tuple without names.
    """
    if node.kind not in {"list", "set"}:
        return node
    named = [name_of(member) for member in node.members]
    if not all(named):
        # A list has no brackets to say that it is an interval, so it is none where the other could be one.
        if bare and node.kind == "list" and other.kind == "()" and not any(named) and not _could_be_interval(other):
            return Several("()", node.members)
        return node
    if all(map(name_of, other.members)):
        return node
    values = tuple(unnamed(member) if isinstance(member, Relation) else member for member in node.members)
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
    return isinstance(node, Value) and node.text in _ELLIPSES
