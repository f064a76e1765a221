r"""Notation: an answer in one form, whatever signs, spaces, units and words it is written with, and what those say.

A unit may be left out on either side; of two units each must be the other. Words that change the value (million, dozen,
half, not) are none.
"""

import re
from decimal import Decimal, InvalidOperation

UNIT = re.compile(
    r"(?:[%°$]|cent|unit|square|cubic|sq|cu|mm|cm|dm|m|km|nm|inch|in|foot|ft|yard|yd|mile|mi|mph|kph|g|kg|mg|gram"
    r"|kilogram|pound|lb|ounce|oz|ton|meter|metre|centimeter|centimetre|millimeter|millimetre|kilometer|kilometre|liter"
    r"|litre|l|ml|gallon|quart|pint|second|sec|s|ms|minute|min|hour|h|hr|day|week|month|year|yr|people|person|student"
    r"|point|way|per|radian|rad|degree|celsius|fahrenheit|kelvin|hz|khz|mhz|ghz|newton|joule|watt|volt|ev|kev|mev"
    r"|pascal|kpa|mol|mole|angstrom|child|man|woman|mouse|sheep|fish|deer|euro|unit|cm2|cc|acre|hectare)(?:\^[23])?"
)
SPELLED = {
    "feet": "foot",
    "inche": "inch",
    "children": "child",
    "men": "man",
    "women": "woman",
    "mice": "mouse",
}
CONNECTIVES = frozenset({"and", "or", ""})
# Before what is counted; they leave the number as it is.
_PLAIN_ADJECTIVES = frozenset({"different", "distinct", "possible", "total", "unique", "positive", "whole"})
# No thing that is counted: they change the number, or say something about it.
_NO_THING = re.compile(
    r"\w*th|half|halve|third|quarter|second|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|hundred"
    r"|thousand|\w*illion|dozen|score|gros|pair|couple|lakh|crore|googol|myriad|time|minu|plu|les|more|fewer|a|i|wa|doe"
    r"|thi|unles|versu|negative|oppositive|opposite|inverse|power|exponent|base|log|root|factorial|mod|modulo|percent"
    r"|bp|basi|k|not|no|ye|alway|remainder|double|triple|twice|perhap|radiu|bia|it|i|ha|guesse|approximation"
)
_NOT_SINGULAR = frozenset({"celsius"})

_TEXTS = re.compile(r"\\(?:textrm|textbf|textit|textnormal|mbox|operatorname|mathrm|rm)\s*\{")
_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}\s*(?:\^\s*\{?(\d)\}?)?")
_BOLD_WORD = re.compile(r"\\(?:mathbf|boldsymbol|bm)\s*\{([^{}]*[\d(][^{}]*|[A-Za-z]{2,})\}")
_NUMBER_AS_TEXT = re.compile(r"\\text\{\s*([+-]?[\d.,]+)\s*\}")
_LETTER_AS_TEXT = re.compile(r"\\mathrm\s*\{([ie])\}|\\imath(?![A-Za-z])")
_RATE = re.compile(r"\\[dt]?frac\{\\text\{([^{}]*)\}\}\{\\text\{([^{}]*)\}\}")
_SIZES = re.compile(
    r"\\(?:left|right|middle|displaystyle|textstyle|limits|bigg?[lr]?|Bigg?[lr]?|mathopen|mathclose)(?![A-Za-z])\s*"
)
_SPACES = re.compile(r"(?<!\\)\\(?:[ ,;:!>]|q?quad(?![A-Za-z]))|~|[\u00a0\u2002-\u200a\u202f\u3000]")
_GROUPED = re.compile(r"(?<![\d.])\d{1,3}(?:(?:\{,\}|\\!|\\,|\\ |~|[ ]|,\\!)+\d{3})+(?![\d])")
_COMMAS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])")
_MIXED = re.compile(r"(?<![\d.])(\d+)(?:\s+|-)(\d+)/(\d+)(?![\d])")
_POWER_OF_TEN = re.compile(r"(?<![\w.}])(\d+(?:\.\d+)?)[eE]([+-]?\d+)(?![\w.])")
_ORDINAL = re.compile(r"(\d)\s*(?:\^\s*\{?\s*)?\\text\{\s*(?:st|nd|rd|th)\s*\}\}?")
_MEMBER_OF = re.compile(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*")
_OF_INTEGERS = re.compile(r"\s*(?:,|\\text\{(?:where|for)\})\s*[A-Za-z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?(?:\^\+)?\s*$")
_BARE_UNIT = re.compile(r"([\d}°)])\s+([A-Za-z]{2,}(?:\s+[A-Za-z]+){0,2})$")
_AFTER = re.compile(r"\s*(?:\\text\s*\{[^{}]*\}\s*(?:\^\s*(?:\{\d\}|\d))?|[%°$])\s*$")
_CHARACTERS = {
    **{"½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}"},
    **{"⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}"},
    **{"⅚": r"\frac{5}{6}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}", "⅞": r"\frac{7}{8}"},
    **{"∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma "},
    **{"δ": r"\delta ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega "},
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ", "∗": "*"},
    **{"−": "-", "–": "-", "‐": "-", "‑": "-", "±": r"\pm ", "∓": r"\mp ", "′": "'", "’": "'"},
    **{"≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "≈": r"\approx "},
    **{"∪": r"\cup ", "∅": r"\emptyset ", "∈": r"\in ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "∖": r"\setminus "},
    **{"，": ",", "（": "(", "）": ")", "：": ":", "…": r"\ldots ", "º": "°", "˚": "°", "％": "%", "⟨": r"\langle "},
    "⟩": r"\rangle ",
}
_TRANSLATED = str.maketrans(_CHARACTERS)
_ANGULAR = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_LOWERED = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?![\d.]*[A-Za-z(\\]))|([A-Za-z]))")
_BARE_ROOT = re.compile(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)")


def plain(answer: str) -> str:
    """Return the answer in LaTeX's own characters, without mathematics delimiters, sizes, spaces in numbers, full stop.

    Units and words are all in one command, and units that have a sign are that sign.
    """
    answer = _unicode(_undelimited(answer))
    answer = _SIZES.sub("", answer)
    answer = _GROUPED.sub(lambda grouped: "".join(re.findall(r"\d", grouped[0])), answer)
    answer = _LETTER_AS_TEXT.sub(lambda letter: letter[1] or "i", answer)
    answer = _TEXTS.sub(r"\\text{", answer)
    answer = _BOLD_WORD.sub(r"\\text{\1}", answer)
    answer = _RATE.sub(r"\\text{\1/\2}", answer)
    answer = _SPACES.sub(" ", answer)
    answer = re.sub(r"\\text\s*\{\s*(and|or|,)?\s*\}", lambda text: f" {_connective(text[1])} ", answer)
    answer = _NUMBER_AS_TEXT.sub(r"\1", answer)
    answer = re.sub(r"\\%|\\text\{\s*(?:percent|per cent|%)\s*\}", "%", answer)
    answer = re.sub(
        r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\text\{\s*degrees?\s*\}|\^\s*°|\^\s*\{\s*°\s*\}", "°", answer
    )
    answer = re.sub(r"\\\$", "$", answer)
    answer = re.sub(r"°\s*(?:\\text\{\s*)?([CF])(?![A-Za-z])\s*\}?", _scale, answer)
    answer = _ORDINAL.sub(r"\1", answer)
    answer = _OF_INTEGERS.sub("", _MEMBER_OF.sub("", answer.strip()))
    answer = re.sub(r"\s+", " ", answer).strip().removesuffix(".").rstrip()
    answer = re.sub(r"(?<=[\d}])\s*(percent|degrees?)$", lambda word: "%" if word[1] == "percent" else "°", answer)
    answer = _BARE_UNIT.sub(_unit_as_text, answer)
    if "," in answer and not re.search(r"[(\[]|\\\{", answer) and "," not in _COMMAS.sub("", answer):
        answer = answer.replace(",", "")
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    return _POWER_OF_TEN.sub(r"\1\\cdot10^{\2}", answer)


def same_text(answer: str, gold: str) -> bool | None:
    """Return whether two answers in words are the same; None when neither is in words, or one is a formula."""
    ours, theirs = _as_text(answer), _as_text(gold)
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


def same_units(answer: str, gold: str) -> bool:
    """Return whether both say the same words and units, or one says none and the other nothing else."""
    ours, theirs = words(answer), words(gold)
    if ours and theirs:
        return [word.removesuffix(_PLURAL) for word in ours] == [word.removesuffix(_PLURAL) for word in theirs]
    return not (ours or theirs) or _of_things(ours or theirs)


def words(answer: str) -> list[str]:
    r"""Return the words in `\text{…}`, lower case and singular, with signs of units among them."""
    said: list[str] = []
    for text, power in _TEXT.findall(answer):
        # A large letter alone is a number of its own (5 M), or a name.
        parts = [part if len(part) == 1 else part.lower() for part in re.split(r"[\s,.()\\/]+", text)]
        parts = [_singular(part) for part in parts if part not in CONNECTIVES]
        if power and parts:
            parts[-1] += f"^{power}"
        said += parts
    rest = _TEXT.sub(" ", answer)
    for sign in "%°$":
        said += [sign] * rest.count(sign)
    return said


def unitless(answer: str) -> str:
    """Return an answer without the units behind it and the dollar sign before it."""
    return _without(answer, "%°$")


def with_factors(answer: str) -> str:
    """Return an answer without its units but those that are a factor, of a hundredth and of a degree."""
    return _without(answer, "$")


def has_factor(answer: str) -> bool:
    """Return whether an answer states per cent or degrees by their sign."""
    return re.search(r"[%°]", _TEXT.sub(" ", answer)) is not None


def _without(answer: str, signs: str) -> str:
    answer = answer.strip().removeprefix("$").strip()
    # The cosine of 20 is not that of 20 degrees.
    signs = signs.replace("°", "") if _ANGULAR.search(answer) else signs
    if answer.startswith("-$"):
        answer = f"-{answer[2:]}"
    while (match := _AFTER.search(answer)) and (match[0].strip()[0] in signs or match[0].strip()[0] == "\\"):
        answer = answer[: match.start()].strip()
    return answer


def _undelimited(answer: str) -> str:
    r"""Return an answer without full stops behind it and `$…$`, `\(…\)` or `\[…\]` around all of it."""
    while True:
        before = answer
        answer = answer.strip()
        # Not a space command's.
        if answer.endswith((".", r"\\")) and not answer.endswith(("...", r"\.")):
            answer = answer.removesuffix(r"\\").removesuffix(".")
        for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            inside = answer[len(opening) : -len(closing)]
            if (
                len(answer) > len(opening) + len(closing)
                and answer.startswith(opening)
                and answer.endswith(closing)
                and not answer.endswith(r"\$")
                and not (re.search(r"(?<!\\)\$", inside) or opening in inside)
            ):
                answer = inside
                break
        if answer == before:
            return answer


def _unicode(answer: str) -> str:
    answer = _ROOT.sub(lambda root: rf"\sqrt{{{next(filter(None, root.groups()))}}}", answer)
    answer = _BARE_ROOT.sub(r"\\sqrt{\1}", answer)
    answer = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda raised: "^{" + raised[0].translate(_RAISED) + "}", answer)
    answer = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda lowered: "_{" + lowered[0].translate(_LOWERED) + "}", answer)
    answer = answer.translate(_TRANSLATED)
    return re.sub(r"(?<![A-Za-z\\])(?:infinity|inf)(?![A-Za-z])", r"\\infty ", answer)


def _connective(word: str | None) -> str:
    return rf"\text{{{word}}}" if word in {"and", "or"} else word or ""


def _scale(match: re.Match[str]) -> str:
    return r"\text{" + {"C": "celsius", "F": "fahrenheit"}[match[1]] + "}"


def _unit_as_text(match: re.Match[str]) -> str:
    said = [_singular(word.lower()) for word in match[2].split()]
    return rf"{match[1]}\text{{{match[2]}}}" if _of_things(said) else match[0]


def _of_things(said: list[str]) -> bool:
    """Return whether words are units, or one thing that is counted."""
    *before, last = said
    if all(UNIT.fullmatch(word) for word in said):
        return True
    thing = last.endswith(_PLURAL) and _NO_THING.fullmatch(last.removesuffix(_PLURAL)) is None
    return (thing or UNIT.fullmatch(last) is not None) and {*before} <= _PLAIN_ADJECTIVES


# What words() leaves behind a word that stood in the plural, so that things are told from other words.
_PLURAL = "+"


def _singular(word: str) -> str:
    singular = word.removesuffix("s") if len(word) > 3 and not word.endswith("ss") else word
    singular = SPELLED.get(singular, singular)
    return singular if UNIT.fullmatch(singular) or singular == word else singular + _PLURAL


def _as_text(answer: str) -> str | None:
    r"""Return the letters of an answer that is one `\text{…}`, in lower case; None when it is anything else."""
    text = re.fullmatch(r"\\text\s*\{([^{}]*)\}", answer)
    if text is None or re.search(r"[\d,]", text[1]):
        return None
    return _letters(text[1])


def _letters(text: str) -> str:
    return re.sub(r"[^a-z]", "", text.lower())


def _decimal(answer: str) -> Decimal | None:
    if re.fullmatch(r"[+-]?(?:\d+|\d{1,3}(?:,\d{3})+)?(?:\.\d+)?", answer) is None:
        return None
    try:
        return Decimal(answer.replace(",", ""))
    except InvalidOperation:
        return None
