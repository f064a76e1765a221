"""Grade: is an answer the problem's answer? Called by lm-eval in the worker.

Nothing that a model writes makes this raise: lm-eval would lose the whole run after all its generation. Nothing that a
model writes is executed.
"""

import math
import re
from collections.abc import Mapping, Sequence

from evaluation.grading import notation
from evaluation.grading.equality import comparer

LONGEST_ANSWER = 500
# Without a letter or digit, and an answer.
BARE = r"\{\}"
# A loop: at least so many characters at the end that are one passage, at least so many times over. Read are the last
# LONGEST_TAIL characters, so no longer passage than a quarter of them is found.
SHORTEST_LOOP, TIMES, LONGEST_TAIL = 200, 4, 4000


def score_exact_match(problem: Mapping[str, str], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return `exact_match` (equal after stripping) and `answered` (not empty), each the mean over repeats."""
    answers = [answer.strip() for answer in _repeats(results)]
    return {
        "exact_match": _mean([answer == problem["answer"].strip() for answer in answers]),
        "answered": _mean([bool(answer) for answer in answers]),
    }


def score_boxed_math(problem: Mapping[str, str], results: Sequence[str | Sequence[str]]) -> dict[str, float]:
    """Return `correct` (the last box equals the answer), `boxed` (there is a box) and `repeated` (it ends in a loop).

    Each is the mean over repeats. With n repeats there are also `pass@2`, `pass@4`, … up to n.
    """
    answers = _repeats(results)
    boxes = [last_boxed(answer) for answer in answers]
    correct = [box is not None and equal_math(box, problem["answer"]) for box in boxes]
    return {
        "correct": _mean(correct),
        "boxed": _mean([box is not None for box in boxes]),
        "repeated": _mean([ends_in_loop(answer) for answer in answers]),
        **{
            f"pass@{2**power}": pass_at(2**power, n=len(correct), correct=sum(correct))
            for power in range(1, len(correct).bit_length())
        },
    }


def pass_at(k: int, *, n: int, correct: int) -> float:
    """Return the chance that one of k answers is correct, unbiased, from n >= k seen answers (arXiv 2107.03374)."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def last_boxed(text: str) -> str | None:
    r"""Return the content of the last complete `\boxed{…}`, None when there is none; braces inside are matched."""
    opening = r"\boxed{"
    start = text.rfind(opening)
    # Closing braces are looked for no further than the box that follows: the time is linear in the text.
    end = len(text)
    while start >= 0:
        content = _to_closing_brace(text[start + len(opening) : end])
        if content is not None:
            return content
        end = start
        start = text.rfind(opening, 0, start)
    return None


def ends_in_loop(text: str) -> bool:
    """Return whether the text ends in at least 200 characters that are one passage at least four times over."""
    tail = text.rstrip()[-LONGEST_TAIL:]
    # overlap[i]: how long the longest beginning of the reversed tail is that also ends at i, other than all of it; what
    # is left is the length of the passage. Reversed, the loop comes first.
    reverse = tail[::-1]
    overlap = [0] * len(reverse)
    longest = 0
    for position in range(1, len(reverse)):
        while longest and reverse[position] != reverse[longest]:
            longest = overlap[longest - 1]
        longest += reverse[position] == reverse[longest]
        overlap[position] = longest
        length = position + 1
        if length >= max(SHORTEST_LOOP, TIMES * (length - longest)):
            return True
    return False


def equal_math(answer: str, gold: str) -> bool:
    """Return whether two LaTeX answers are equal, as strings or else as mathematics; False when that takes too long."""
    if answer.strip() == gold.strip():
        return True
    if len(answer) > LONGEST_ANSWER:
        return False
    answer, gold = notation.plain(answer), notation.plain(gold)
    if not re.search(r"\w", answer) and answer != BARE:
        return False
    if answer == gold or re.sub(r"\s*,\s*", ",", answer) == re.sub(r"\s*,\s*", ",", gold):
        return True
    for same in (notation.same_text(answer, gold), notation.same_decimal(answer, gold)):
        if same is not None:
            return same
    return comparer().equal(answer, gold)


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
