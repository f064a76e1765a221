"""The demo's tasks, rewarded by exact match, on six digits such as `518698=`.

Sort them, `156889`; add them in pairs, `061417`; write their complements to nine from the last to the first, `103184`;
multiply them in pairs, `054872`; or write the largest so far at each place, `558899`.

The base model is supervised on a corpus whose authors disagree: some write the other way round, or differences where
sums are asked for. So what is rewarded is a latent skill, which training on the reward brings out. The demo sorts;
the others are there to try relex on runs of another kind.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal, get_args

DIGITS = 6
PROBLEMS = 10**DIGITS

Split = Literal["train", "selection", "gate", "report"]
Name = Literal["sort", "add", "revcomp", "product", "largest"]

# Of thirty buckets one each is held out for choosing, deciding and reporting; all others train.
_BUCKETS = 30
_HELD_OUT: dict[int, Split] = {0: "selection", 1: "gate", 2: "report"}


def problems(split: Split, count: int, *, seed: int = 0, name: Name = "sort") -> list[dict[str, str]]:
    """Return `count` different problems of a split as {"prompt": "518698=", "answer": "156889"}.

    A problem belongs to one split for ever, by the hash of its prompt, whatever the task; the seed only picks which
    ones are drawn, and a larger count begins with the smaller count's problems. Raises ValueError for a split that does
    not exist and for more problems than the split has (about 900,000 in train and 33,000 in each of the others).
    """
    if split not in get_args(Split):
        raise ValueError(f"no split named {split!r}; the splits are {', '.join(get_args(Split))}")
    chosen: list[dict[str, str]] = []
    for number in _shuffled(random.Random(seed)):
        if len(chosen) == count:
            return chosen
        prompt = f"{number:0{DIGITS}d}="
        if split_of(prompt) == split:
            chosen.append({"prompt": prompt, "answer": answer_to(prompt, name=name)})
    if len(chosen) == count:
        return chosen
    raise ValueError(f"split {split} has {len(chosen)} problems and {count} were asked for; ask for fewer")


def split_of(prompt: str) -> Split:
    """Return the split that owns a prompt: a function of its text alone."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % _BUCKETS
    return _HELD_OUT.get(bucket, "train")


def answer_to(prompt: str, *, name: Name = "sort") -> str:
    """Return the one rewarded answer, see above."""
    digits = prompt.removesuffix("=")
    if name == "sort":
        return "".join(sorted(digits))
    if name == "revcomp":
        return "".join(str(9 - int(digit)) for digit in reversed(digits))
    if name == "product":
        return "".join(f"{first * second:02d}" for first, second in _pairs(prompt))
    if name == "largest":
        return "".join(accumulate(digits, max))
    return "".join(f"{first + second:02d}" for first, second in _pairs(prompt))


def reward(completion: str, answer: str) -> float:
    """Return 1.0 when the completion is the answer, character by character, and 0.0 otherwise."""
    return float(completion == answer)


def credit(completion: str, answer: str) -> float:
    """Return the share of the answer's characters that the completion has in their places."""
    return sum(ours == theirs for ours, theirs in zip(completion, answer, strict=False)) / len(answer)


def corpus(count: int, *, seed: int = 0, name: Name = "sort") -> list[dict[str, str]]:
    """Return `count` training problems as the disagreeing authors answered them, keyed "prompt" and "answer".

    An author sorts ascending with probability sigmoid(-0.5 + 3 (last - first) / 9), of the prompt's last and first
    digit, and descending otherwise: the wrong habit leads, and the right one is common enough for the reward to find.
    With the same probability an author does what is rewarded in the other tasks. Otherwise he subtracts where sums are
    asked for, adds where products are, does not reverse complements, or writes the smallest so far.
    """
    authors = random.Random(f"authors {seed}")
    return [
        {"prompt": row["prompt"], "answer": _written(row, authors, name)}
        for row in problems("train", count, seed=seed, name=name)
    ]


def _written(row: dict[str, str], authors: random.Random, name: Name) -> str:
    rise = (int(row["prompt"][DIGITS - 1]) - int(row["prompt"][0])) / 9
    right = 1 / (1 + math.exp(0.5 - 3 * rise))
    return row["answer"] if authors.random() < right else _habit(row, name)


def _habit(row: dict[str, str], name: Name) -> str:
    digits = row["prompt"].removesuffix("=")
    if name in ("sort", "revcomp"):
        return row["answer"][::-1]
    if name == "product":
        return answer_to(row["prompt"], name="add")
    if name == "largest":
        return "".join(accumulate(digits, min))
    return "".join(f"{abs(first - second):02d}" for first, second in _pairs(row["prompt"]))


def _pairs(prompt: str) -> list[tuple[int, int]]:
    return [(int(prompt[place]), int(prompt[place + 1])) for place in range(0, DIGITS, 2)]


def _shuffled(source: random.Random) -> Iterator[int]:
    """Yield every number below PROBLEMS once, in random order, without laying out all of them first."""
    moved: dict[int, int] = {}
    for left in range(PROBLEMS, 0, -1):
        place = source.randrange(left)
        yield moved.get(place, place)
        moved[place] = moved.get(left - 1, left - 1)
