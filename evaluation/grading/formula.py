r"""Formula: one LaTeX expression, read strictly into sympy, and whether two of them are equal.

What could be read in two ways is not read: `1/2x`, `\sqrt12`, `2\frac{3}{2}`, `x2`. Nothing of an answer is overlooked:
what the grammar does not know, and what is left over, is refused.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, TypeAlias

import sympy

Expression: TypeAlias = Any  # sympy carries no types

# Differences below this are rounding of numbers computed to so many digits.
DIGITS, SMALLEST = 30, sympy.Rational(1, 10**50)
MOST_DIGITS = 300
# Two expressions in variables are equal when they are at points of every sign and size, none near another.
POINTS = (
    (sympy.Rational(17, 7), sympy.Rational(29, 13)),
    (sympy.Rational(3, 11), sympy.Rational(5, 23)),
    (sympy.Rational(-19, 6), sympy.Rational(31, 17)),
    (sympy.Rational(-23, 9), sympy.Rational(-37, 14)),
    (sympy.Rational(41, 4), sympy.Rational(-7, 19)),
)
FEWEST_POINTS = 3

_TOKEN = re.compile(
    r"\s+|\\[ ,;:!>]|~|\\q?quad(?![A-Za-z])"
    r"|(?P<token>\d*\.\d*\\overline\{\d+\}|\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\\.|[^\s\\])",
    re.DOTALL,
)
_NUMBER = re.compile(r"(\d*)(?:\.(\d*))?(?:\\overline\{(\d+)\})?")
_GREEK = re.compile(
    r"\\(?:var)?(?:[aA]lpha|[bB]eta|[gG]amma|[dD]elta|epsilon|zeta|eta|[tT]heta|iota|kappa|[lL]ambda|mu|nu|[xX]i"
    r"|[rR]ho|[sS]igma|tau|[uU]psilon|[pP]hi|chi|[pP]si|[oO]mega|ell|Pi|hbar)"
)
_FUNCTIONS: dict[str, Callable[[Expression], Expression]] = {
    **{rf"\{name}": getattr(sympy, name) for name in ("sin", "cos", "tan", "cot", "sec", "csc")},
    **{rf"\{name}": getattr(sympy, name) for name in ("sinh", "cosh", "tanh", "exp")},
    **{rf"\arc{name}": getattr(sympy, f"a{name}") for name in ("sin", "cos", "tan")},
    r"\ln": sympy.log,
}
_INVERSES = {r"\sin": sympy.asin, r"\cos": sympy.acos, r"\tan": sympy.atan}
_FRACTIONS = {r"\frac", r"\dfrac", r"\tfrac", r"\cfrac"}
_BINOMIALS = {r"\binom", r"\dbinom", r"\tbinom"}
_ACCENTS = {
    r"\overline",
    r"\bar",
    r"\vec",
    r"\hat",
    r"\overrightarrow",
    r"\widehat",
    r"\tilde",
    r"\mathbf",
    r"\mathcal",
}
_TIMES = {r"\cdot", r"\times", "*", r"\ast", "·", "×"}
_DIVIDE = {"/", r"\div"}
_CLOSING = {"(": ")", "[": "]", "|": "|", r"\lvert": r"\rvert", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_MATRICES = {"pmatrix", "bmatrix", "vmatrix", "matrix", "array", "smallmatrix"}
# A symbol that no answer can name: the base of a logarithm that states none.
_SOME_BASE = sympy.Symbol("base")
# Applied to what stands in parentheses behind them; any other letter is multiplied with it.
_APPLIED = {"f", "g", "h"}


class UnreadableError(ValueError):
    """Some text is no formula, or could be more than one."""


@lru_cache(maxsize=1000)
def read_formula(text: str, *, imaginary: bool) -> Expression:
    """Return the sympy expression or matrix that a LaTeX text states, `i` as the imaginary unit or as a letter.

    Numbers are exact. UnreadableError when the text is no such formula.
    """
    reader = _Reader(text, imaginary=imaginary)
    formula = reader.inside()
    if reader.token:
        raise UnreadableError(text)
    return formula


def same_value(ours: Expression, theirs: Expression) -> bool:
    """Return whether two expressions are equal wherever both have a value, entry by entry for matrices."""
    if isinstance(ours, sympy.MatrixBase) or isinstance(theirs, sympy.MatrixBase):
        return (
            isinstance(ours, sympy.MatrixBase)
            and isinstance(theirs, sympy.MatrixBase)
            and ours.shape == theirs.shape
            and all(same_value(one, other) for one, other in zip(ours.flat(), theirs.flat(), strict=True))
        )
    if ours.has(sympy.nan, sympy.zoo) or theirs.has(sympy.nan, sympy.zoo):
        return False
    if ours == theirs:
        return True
    if (ours.is_Rational and theirs.is_Rational) or ours.has(sympy.oo) or theirs.has(sympy.oo):
        return False
    differences = list(_at_points(ours - theirs))
    return bool(differences) and all(abs(each) < SMALLEST for each in differences)


def constant_ratio(ours: Expression, theirs: Expression) -> Expression | None:
    """Return by which number other than 0 the first is the second times, None when by none: numbers are none either."""
    if not isinstance(ours, sympy.Expr) or not isinstance(theirs, sympy.Expr) or not theirs.free_symbols:
        return None
    if ours.free_symbols != theirs.free_symbols:
        return None
    ratios = list(_at_points(ours / theirs))
    same = bool(ratios) and all(abs(each - ratios[0]) < SMALLEST for each in ratios)
    return ratios[0] if same and abs(ratios[0]) > SMALLEST else None


def number(expression: Expression) -> float | None:
    """Return a real number's value, infinite ones too; None for anything else."""
    if not isinstance(expression, sympy.Expr) or expression.free_symbols:
        return None
    value = expression.evalf(DIGITS, maxn=MOST_DIGITS)
    return float(value) if value.is_extended_real else None


def _at_points(expression: Expression) -> Iterator[Expression]:
    """Yield the values of an expression at the points where it has one; none when it has too few."""
    symbols = sorted(expression.free_symbols, key=str)
    values = []
    for first, step in POINTS if symbols else POINTS[:1]:
        # A symbol more is another power of the step away: no point lies on what answers may have as a curve.
        at = {symbol: first * abs(step) ** place * (step / abs(step)) ** place for place, symbol in enumerate(symbols)}
        value = expression.xreplace(at).evalf(DIGITS, maxn=MOST_DIGITS)
        if value.is_number and value.is_finite:
            values.append(value)
    if len(values) >= (FEWEST_POINTS if symbols else 1):
        yield from values


class _Reader:
    """A text's tokens, and where reading has come to; each method reads what its name says, or refuses."""

    def __init__(self, text: str, *, imaginary: bool) -> None:
        self._text = text
        self._imaginary = imaginary
        self._tokens = []
        position = 0
        while position < len(text):
            match = _TOKEN.match(text, position)
            if match is None:
                raise UnreadableError(text)
            if match["token"]:
                self._tokens.append(match["token"])
            position = match.end()
        self._tokens.reverse()

    @property
    def token(self) -> str:
        return self._tokens[-1] if self._tokens else ""

    def inside(self) -> Expression:
        r"""Return what fills a group or all of the text, `a \over b` and `n \choose k` too."""
        first = self.sum()
        if self.token not in {r"\over", r"\choose"}:
            return first
        over = self._next() == r"\over"
        second = self.sum()
        return first / second if over else sympy.binomial(first, second)

    def sum(self) -> Expression:
        total = self._signed()
        while self.token in {"+", "-"}:
            minus = self._next() == "-"
            term = self._signed()
            total = total - term if minus else total + term
        return total

    def _signed(self) -> Expression:
        if self.token in {"+", "-"}:
            return -self._product() if self._next() == "-" else self._product()
        return self._product()

    def _product(self) -> Expression:
        mixed = self._mixed()
        product = self._power() if mixed is None else mixed
        divided = False
        while True:
            if self.token in _TIMES:
                self._next()
                product *= self._signed_power()
                divided = False
            elif self.token in _DIVIDE:
                self._next()
                divisor = self._signed_power()
                if isinstance(divisor, sympy.MatrixBase) or divided:
                    self._refuse()
                product /= divisor
                divided = True
            elif self._begins_factor():
                # 1/2x, x2, 2 3
                if divided or self.token[0].isdigit() or self.token[0] == ".":
                    self._refuse()
                product *= self._power()
            else:
                return product

    def _signed_power(self) -> Expression:
        if self.token == "-":
            self._next()
            return -self._power()
        return self._power()

    def _mixed(self) -> Expression | None:
        """Return a whole number and a fraction beside it as their sum, None when something else stands here."""
        if not self.token.isdigit() or len(self._tokens) < 2 or self._tokens[-2] not in _FRACTIONS:
            return None
        whole, command = self._next(), self._next()
        over, under = self._fraction_parts()
        if not (over.is_Integer and under.is_Integer):
            return self._times_powers(sympy.Integer(whole), over / under)
        if not 0 < over < under or self.token in {"^", "!"}:
            self._refuse(command)
        return sympy.Integer(whole) + over / under

    def _times_powers(self, left: Expression, right: Expression) -> Expression:
        if self.token in {"^", "!"}:
            self._refuse()
        return left * right

    def _begins_factor(self) -> bool:
        token = self.token
        if not token or token in {
            ")",
            "]",
            "}",
            "+",
            "-",
            ",",
            "|",
            "&",
            r"\\",
            "=",
            "<",
            ">",
            "^",
            "_",
            "!",
            "'",
            "%",
        }:
            return False
        return token not in {r"\end", r"\rvert", r"\rfloor", r"\rceil", r"\over", r"\choose", "°"}

    def _power(self) -> Expression:
        power = self._atom()
        while self.token in {"!", "^", "%", "°"}:
            mark = self._next()
            if mark == "%":
                power /= 100
            elif mark == "°":
                power *= sympy.pi / 180
            elif mark == "!":
                if self.token == "!" or isinstance(power, sympy.MatrixBase):
                    self._refuse()
                power = sympy.factorial(power)
            else:
                power = power ** self._argument(digit=False)
                if self.token == "^":
                    self._refuse()
        if self.token in {"_", "'"}:
            self._refuse()
        return power

    def _atom(self) -> Expression:
        token = self._next()
        if token[0].isdigit() or token[0] == ".":
            return self._number(token)
        if len(token) == 1 and token.isalpha() and token.isascii():
            return self._letter(token)
        if token in _CLOSING:
            return self._enclosed(token)
        if token == "{":
            return self._group()
        if token in _FRACTIONS:
            over, under = self._fraction_parts()
            return over / under
        if token in _BINOMIALS:
            return sympy.binomial(self._argument(), self._argument())
        if token == r"\sqrt":
            return self._root()
        if token in _FUNCTIONS:
            return self._applied(token)
        if token == r"\log":
            return self._logarithm()
        if token in {r"\sum", r"\prod"}:
            return self._series(token)
        if token == r"\begin":
            return self._matrix()
        if token == r"\pi":
            return sympy.pi
        if token == r"\infty":
            return sympy.oo
        if token in _ACCENTS:
            return sympy.Symbol(token + self._raw() + self._subscript())
        if _GREEK.fullmatch(token):
            return sympy.Symbol(token + self._subscript())
        return self._refuse(token)

    def _letter(self, letter: str) -> Expression:
        subscript = self._subscript()
        if letter in _APPLIED and self.token == "(" and not subscript:
            return sympy.Symbol(letter + self._raw())
        if subscript:
            return sympy.Symbol(letter + subscript)
        if letter == "e":
            return sympy.E
        return sympy.I if letter == "i" and self._imaginary else sympy.Symbol(letter)

    def _subscript(self) -> str:
        if self.token != "_":
            return ""
        self._next()
        return "_" + self._raw()

    def _number(self, token: str) -> Expression:
        whole, decimals, repeating = _NUMBER.fullmatch(token).groups("")  # type: ignore[union-attr]
        exact = sympy.Rational(int(whole + decimals or "0"), 10 ** len(decimals))
        if repeating:
            exact += sympy.Rational(int(repeating), 10 ** len(decimals) * (10 ** len(repeating) - 1))
        return exact

    def _enclosed(self, opening: str) -> Expression:
        inside = self.sum()
        self._expect(_CLOSING[opening])
        if opening in {"|", r"\lvert"}:
            return inside.det() if isinstance(inside, sympy.MatrixBase) else sympy.Abs(inside)
        return {r"\lfloor": sympy.floor, r"\lceil": sympy.ceiling}.get(opening, lambda whole: whole)(inside)

    def _group(self) -> Expression:
        inside = self.inside()
        self._expect("}")
        return inside

    def _argument(self, *, digit: bool = True) -> Expression:
        """Return what a command or `^` is applied to: a group, a digit (a number for ^), a letter or a command."""
        token = self.token
        if token == "{":
            self._next()
            return self._group()
        if token.isdigit():
            self._next()
            if digit and len(token) > 1:
                self._tokens.append(token[1:])
                token = token[0]
            return sympy.Integer(token)
        if token == "-" and not digit:
            self._refuse()
        return self._atom()

    def _fraction_parts(self) -> tuple[Expression, Expression]:
        over, under = self._argument(), self._argument()
        # \frac123
        if self.token[:1].isdigit() or isinstance(under, sympy.MatrixBase):
            self._refuse()
        return over, under

    def _root(self) -> Expression:
        degree: Expression = sympy.Integer(2)
        if self.token == "[":
            self._next()
            degree = self.sum()
            self._expect("]")
        # \sqrt12
        if self.token.isdigit() and len(self.token) > 1:
            self._refuse()
        inside = self._argument()
        if degree.is_Integer and degree % 2 and inside.is_number and inside.is_negative:
            return -((-inside) ** (1 / degree))
        return inside ** (1 / degree)

    def _applied(self, name: str) -> Expression:
        function, power = _FUNCTIONS[name], None
        if self.token == "^":
            self._next()
            power = self._argument()
            if power == -1:
                if name not in _INVERSES:
                    self._refuse(name)
                function, power = _INVERSES[name], None
        value = function(self._function_argument())
        return value if power is None else value**power

    def _logarithm(self) -> Expression:
        base: Expression = _SOME_BASE
        if self.token == "_":
            self._next()
            base = self._argument()
        return sympy.log(self._function_argument()) / sympy.log(base)

    def _function_argument(self) -> Expression:
        """Return what stands in parentheses, or the factors up to the next function, sign or bracket."""
        if self.token in _CLOSING or self.token == "{":
            return self._atom()
        product = self._power()
        while (
            self._begins_factor()
            and self.token not in _CLOSING
            and self.token not in {*_FUNCTIONS, *_TIMES, *_DIVIDE, r"\log", "{"}
        ):
            if self.token[0].isdigit():
                self._refuse()
            product *= self._power()
        # \sin 2\pi/3
        if self.token in _DIVIDE:
            self._refuse()
        return product

    def _series(self, command: str) -> Expression:
        self._expect("_")
        self._expect("{")
        variable = self._atom()
        self._expect("=")
        first = self.sum()
        self._expect("}")
        self._expect("^")
        last = self._argument(digit=False)
        kind = sympy.Sum if command == r"\sum" else sympy.Product
        return kind(self._product(), (variable, first, last)).doit()

    def _matrix(self) -> Expression:
        name = self._raw().strip("{}")
        if name not in _MATRICES:
            self._refuse(name)
        if name == "array":
            self._raw()
        rows = [[self.sum()]]
        while self.token in {"&", r"\\"}:
            if self._next() == "&":
                rows[-1].append(self.sum())
            elif self.token != r"\end":
                rows.append([self.sum()])
        self._expect(r"\end")
        if self._raw().strip("{}") != name or len({len(row) for row in rows}) != 1:
            self._refuse(name)
        matrix = sympy.ImmutableDenseMatrix(rows)
        return matrix.det() if name == "vmatrix" else matrix

    def _raw(self) -> str:
        """Return the next token, or the next group in braces or parentheses, as it is written but for spaces."""
        closing = {"{": "}", "(": ")"}.get(self.token)
        opening = self.token
        text, depth = self._next(), 1
        while closing and depth:
            token = self._next()
            depth += (token == opening) - (token == closing)
            text += token
        # x_{1} is x_1.
        return text[1:-1] if re.fullmatch(r"\{\w\}", text) else text

    def _next(self) -> str:
        if not self._tokens:
            self._refuse()
        return self._tokens.pop()

    def _expect(self, token: str) -> None:
        if self._next() != token:
            self._refuse(token)

    def _refuse(self, what: str = "") -> Any:
        raise UnreadableError(f"{self._text}: {what or self.token}")
