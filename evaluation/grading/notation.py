r"""Notation: what an answer says beside its value, and what a mathematics library would overlook.

Such a library drops words and units, reads `1 2` as a sum, `3=4` as 4, `11_3` as 11, `R` as r, and takes a tuple for a
set. Here an answer is put into one form, and refused where it differs from the gold answer in any of these.
"""

import re
from decimal import Decimal, InvalidOperation

# A unit may be left out on either side; of two units each must be the other. Words that change the value (million,
# dozen, half, not) are none.
UNIT = re.compile(
    r"(?:[%°$]|cent|unit|square|cubic|sq|cu|mm|cm|m|km|inch|in|foot|ft|yard|yd|mile|mi|mph|g|kg|mg|gram|kilogram"
    r"|meter|metre|centimeter|centimetre|kilometer|kilometre|liter|litre|l|ml|second|sec|s|minute|min|hour|h|hr|day|week"
    r"|month|year|people|person|student|point|way|per)(?:\^[23])?"
)
SPELLED = {"percent": "%", "degree": "°", "dollar": "$", "inche": "inch", "feet": "foot"}
CONNECTIVES = frozenset({"and", "or", ""})

_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}\s*(?:\^\s*\{?(\d)\}?)?"
)
_NUMBER_AS_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf)\{\s*([+-]?[\d.,]+)\s*\}")
_SIGNS = (
    (re.compile(r"\\?%"), "%"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree\b|°"), "°"),
    (re.compile(r"\\\$"), "$"),
)
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|\\!|\\,|\\ |~|[ ])+\d{3})+(?![\d])")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)/(\d+)(?![\d])")
_APART = re.compile(r"\d(?:\s|\\[ ,;:!]|~|\\q?quad)+\d")
_BASE = re.compile(r"\d_\{?(\d+)\}?")
_CLOCK = re.compile(r"\d{1,2}:\d\d")
_EQUALS = re.compile(r"(?<![<>!:\\])=")
_NAME = re.compile(
    r"\\?[A-Za-z]+'*(?:_\{?\w+\}?)?(?:\^\{-1\})?(?:\([\w, ]*\))?"  # x, x_1, \theta, AB, f(x), f^{-1}(2)
    r"|\\(?:angle|overline|triangle)\s*\{?[A-Z]+\}?|m?\\angle\s*[A-Z]+"
    r"|\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)"  # (x, y)
)


def plain(answer: str) -> str:
    """Return the answer without dollar signs around it, final full stop, spaces in numbers and sizes of brackets."""
    answer = answer.strip()
    while len(answer) > 1 and answer.startswith("$") and answer.endswith("$") and not answer.endswith(r"\$"):
        answer = answer[1:-1].strip()
    answer = re.sub(r"\\(?:left|right|displaystyle|bigl?|bigr?|Bigl?|Bigr?)(?![A-Za-z])\s*", "", answer)
    answer = re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", answer)
    answer = _NUMBER_AS_TEXT.sub(r"\1", answer)
    answer = answer.removesuffix(".").rstrip()
    answer = _GROUPED.sub(lambda grouped: "".join(re.findall(r"\d", grouped[0])), answer)
    return _MIXED.sub(r"\1\\frac{\2}{\3}", answer)


def words(answer: str) -> list[str]:
    r"""Return the words in `\text{…}` and the like, lower case and singular, with signs of units among them."""
    said: list[str] = []
    for text, power in _TEXT.findall(answer):
        parts = [_singular(part) for part in re.split(r"[\s,.()\\/]+", text.lower())]
        parts = [part for part in parts if part not in CONNECTIVES]
        if power and parts:
            parts[-1] += f"^{power}"
        said += parts
    rest = _TEXT.sub(" ", answer)
    for sign, name in _SIGNS:
        said += [name] * len(sign.findall(rest))
    return said


def as_text(answer: str) -> str | None:
    r"""Return the letters of an answer that is one `\text{…}`, in lower case; None when it is anything else."""
    text = _TEXT.fullmatch(answer)
    if text is None or re.search(r"\d", text[1]):
        return None
    return _letters(text[1])


def same_text(answer: str, gold: str) -> bool | None:
    """Return whether two answers in words are the same; None when neither is in words, or one is a formula."""
    ours, theirs = as_text(answer), as_text(gold)
    if ours is None and theirs is None:
        return None
    # A word may stand bare on one side; a formula may not.
    bare = re.compile(r"\(?[A-Za-z][A-Za-z ]*\)?")
    ours = _letters(answer) if ours is None and bare.fullmatch(answer) else ours
    theirs = _letters(gold) if theirs is None and bare.fullmatch(gold) else theirs
    return None if ours is None or theirs is None else ours == theirs


def same_decimal(answer: str, gold: str) -> bool | None:
    """Return whether two plain numbers are exactly equal; None when one is no plain number."""
    ours, theirs = _decimal(answer), _decimal(gold)
    return None if ours is None or theirs is None else ours == theirs


def comparable(answer: str, gold: str) -> bool:
    """Return whether nothing that a library overlooks tells the two apart; both as `plain` returns them."""
    return (
        r"\boxed" not in answer
        and re.search(r"(?<!\\)\$", answer) is None
        and _same_units(words(answer), words(gold))
        and {_brackets(answer), _brackets(gold)} != {"set", "sequence"}
        and _same_base(answer, gold)
        and _APART.search(answer) is None
        and not (_CLOCK.fullmatch(gold) or _CLOCK.fullmatch(answer))
        and not _two_cases(answer)
        and not _two_cases(gold)
    )


def sides(answer: str, gold: str) -> list[str]:
    """Return what must equal the gold answer: the answer, or, when it is an equation and gold is none, its sides.

    The name at its beginning is no side: `x = 5` is 5. An unordered list takes the brackets of an ordered gold answer.
    """
    if _brackets(gold) == "sequence" and _brackets(answer) == "none" and re.search(r"^[^()\[\]{}=]+,", answer):
        return [gold[0] + answer + gold[-1]]
    if _EQUALS.search(gold) or "," in answer or not _EQUALS.search(answer):
        return [answer]
    parts = [part.strip() for part in _EQUALS.split(answer)]
    return parts[1:] if _NAME.fullmatch(parts[0]) else parts


def _singular(word: str) -> str:
    word = word if len(word) < 4 else word.removesuffix("s")
    return SPELLED.get(word, word)


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def _same_units(ours: list[str], theirs: list[str]) -> bool:
    if ours == theirs:
        return True
    known = all(UNIT.fullmatch(word) for word in (*ours, *theirs))
    return known and not (ours and theirs)


def _brackets(answer: str) -> str:
    answer = _TEXT.sub("", answer).strip()
    if answer.startswith(r"\{") and answer.endswith(r"\}"):
        return "set"
    # (x+1)(x-1) opens and closes, and has no comma.
    return "sequence" if answer[:1] in {"(", "["} and answer[-1:] in {")", "]"} and "," in answer else "none"


def _same_base(answer: str, gold: str) -> bool:
    ours, theirs = _BASE.findall(answer), _BASE.findall(gold)
    return not ours or not theirs or ours == theirs


def _two_cases(answer: str) -> bool:
    letters = re.sub(r"\\[A-Za-z]+", " ", _TEXT.sub(" ", answer))
    return any(letter.swapcase() in letters for letter in set(re.findall(r"[a-z]", letters)))


def _decimal(answer: str) -> Decimal | None:
    if re.fullmatch(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?", answer) is None:
        return None
    try:
        return Decimal(answer.replace(",", ""))
    except InvalidOperation:
        return None
