"""Grade: is an answer the problem's answer? Called by lm-eval, in the main thread of the worker only.

Nothing here raises: lm-eval would lose the whole run after all its generation. Nothing here executes what a model
wrote.
"""

from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_ANSWER = 500
SECONDS = 3


def score_exact_match(problem: Mapping[str, str], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return `exact_match` (equal after stripping) and `answered` (not empty), each the mean over repeats."""
    answers = [answer.strip() for answer in _repeats(results)]
    return {
        "exact_match": _mean([answer == problem["answer"].strip() for answer in answers]),
        "answered": _mean([bool(answer) for answer in answers]),
    }


def score_boxed_math(problem: Mapping[str, str], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return `correct` (the last box equals the answer) and `answered` (there is a box), each the mean over repeats."""
    answers = [last_boxed(answer) for answer in _repeats(results)]
    return {
        "correct": _mean([answer is not None and equal_math(answer, problem["answer"]) for answer in answers]),
        "answered": _mean([answer is not None for answer in answers]),
    }


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}`, None when there is none; braces inside are matched."""
    opening = r"\boxed{"
    start = text.rfind(opening)
    while start >= 0:
        content = _to_closing_brace(text[start + len(opening) :])
        if content is not None:
            return content
        start = text.rfind(opening, 0, start)
    return None


def equal_math(answer: str, gold: str) -> bool:
    """Return whether two LaTeX answers are equal, as strings or else as mathematics; False when that takes too long."""
    answer, gold = answer.strip(), gold.strip()
    if answer == gold:
        return True
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    import math_verify
    from math_verify.errors import TimeoutException

    try:
        return bool(math_verify.verify(_parsed(gold), _parsed(answer), timeout_seconds=SECONDS))
    # A BaseException, and the alarm can ring just outside of the library's own handlers.
    except TimeoutException:
        return False


def _parsed(latex: str) -> Any:  # a list of sympy expressions and strings
    import math_verify

    return math_verify.parse(rf"$\boxed{{{latex}}}$", parsing_timeout=SECONDS)


def _repeats(results: Sequence[str | Sequence[str]]) -> Sequence[str]:
    # lm-eval hands over one entry a request: a list of repeats, or one string if a filter has chosen among them.
    return [results[0]] if isinstance(results[0], str) else results[0]


def _mean(outcomes: Sequence[bool]) -> float:
    return sum(outcomes) / len(outcomes)


def _to_closing_brace(text: str) -> str | None:
    depth = 1
    escaped = False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[:position]
    return None
