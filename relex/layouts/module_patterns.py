"""Numbers by patterns of module names, as peft's `rank_pattern` and `alpha_pattern` give them.

A pattern is a regular expression from somebody else's file, and there are those that never end. So it is counted
beforehand in how many ways one may fit a name, and what has too many is refused.
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import Any

from relex.errors import CheckpointMismatchError
from relex.formats.pickled import shown

# A hundred million take about a second.
_MOST_WAYS = 1 << 24
_MOST_WAYS_OF_ALL = 1 << 32
_MOST_CHARACTERS = 1000
_REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT, _constants.POSSESSIVE_REPEAT)


@dataclass(frozen=True)
class ModulePatterns:
    """The number of each pattern, and of every module that none fits."""

    numbers: Sequence[tuple[re.Pattern[str], float]]
    otherwise: float

    def of(self, module: str) -> float:
        """Return the number of the first pattern that a module's name ends in, as peft looks it up."""
        return next((number for pattern, number in self.numbers if pattern.match(module)), self.otherwise)


def read_patterns(
    given: Mapping[str, float], key: str, modules: Collection[str], *, otherwise: float, where: str
) -> ModulePatterns:
    """Return the patterns under `key`, to be asked for `modules`; `otherwise` is the number of all others.

    Raises CheckpointMismatchError for what is no regular expression, or might take for ever.
    """
    numbers, of_all = [], 0
    for pattern, number in given.items():
        compiled, ways = compile_bounded(pattern, rf"(.*\.)?({pattern})$", modules, so_far=of_all, key=key, where=where)
        of_all += ways
        numbers.append((compiled, number))
    return ModulePatterns(numbers, otherwise)


def compile_bounded(
    pattern: str, expression: str, modules: Collection[str], *, key: str, where: str, so_far: int = 0
) -> tuple[re.Pattern[str], int]:
    """Return an expression made of the pattern under `key`, and a bound on the ways to try it on all `modules`.

    `so_far` are those of the patterns before it. Raises CheckpointMismatchError for what is no regular expression, or
    might take for ever.
    """
    longest = max(map(len, modules), default=0)
    try:
        ways = _ways(pattern, longest)
        of_all = ways * len(modules)
        compiled = re.compile(expression) if ways <= _MOST_WAYS and so_far + of_all <= _MOST_WAYS_OF_ALL else None
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointMismatchError(
            f"{where}: {key} has {shown(pattern)}, which is no regular expression ({error}). Save the adapter again."
        ) from error
    if compiled is None:
        raise CheckpointMismatchError(
            f"{where}: {key} has {shown(pattern)}, which fits a name of {longest} characters in too many ways to try."
            " Train with the modules' own names instead."
        )
    return compiled, of_all


def _ways(pattern: str, length: int) -> int:
    """Return a bound on the ways in which a pattern fits the end of a name of `length` characters."""
    if len(pattern) > _MOST_CHARACTERS:
        return _MOST_WAYS + 1
    choices, repeats = _choices(_parser.parse(pattern), length)
    # Each repeat ends somewhere in the name, one after the other; one more stands for where the pattern begins.
    return choices * math.comb(length + repeats + 1, repeats + 1)


def _choices(items: Any, length: int) -> tuple[int, int]:
    """Return a bound on the choices that a parsed pattern has, and how many of its items repeat."""
    choices, repeats = 1, 0
    for kind, content in items:
        inner: Sequence[Any] = ()
        if kind is _constants.BRANCH:
            inner = content[1]
        elif kind is _constants.GROUPREF_EXISTS:
            inner = [one for one in content[1:] if one is not None]
        elif kind in (_constants.SUBPATTERN, _constants.ASSERT, _constants.ASSERT_NOT, *_REPEATS):
            inner = [content[-1]]
        elif kind is _constants.ATOMIC_GROUP:
            inner = [content]
        branches = [_choices(one, length) for one in inner]
        more = sum(each for each, _ in branches) or 1
        repeats += max((count for _, count in branches), default=0)
        if kind in _REPEATS:
            least, most, _ = content
            # A repeat of what has choices of its own has them each time.
            if least > length or (most > 1 and branches[0] != (1, 0)):
                return _MOST_WAYS + 1, 0
            more, repeats = (more + 1, repeats) if most == 1 else (more, repeats + 1)
        choices = min(choices * more, _MOST_WAYS + 1)
    return choices, repeats
