"""What looks wrong in a trajectory, told from its Gram: checkpoints saved twice, jumps, holes, a base of another run.

A duplicate is refused, since it is two names for one observation. The others are warnings: a learning rate that
changes or a checkpoint that somebody deleted is the run's own history, and a reader should know.
Shape suffixes: T = tensors that move, K = checkpoints (with the base in front: K + 1 points, K increments).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from relex.errors import DuplicateError
from relex.gram import Gram

# A jump is both: this many times the median rate, and this many robust deviations from it on a logarithmic scale. A
# learning rate that warms up or decays stays below the first, the scatter of a noisy run below the second.
JUMP_RATIO = 5.0
JUMP_DEVIATIONS = 8.0
# RL moves weights by a thousandth of their norm; models of one shape and different training are 1.4 norms apart.
FAR = 0.5
# Of fewer increments no distribution can be told.
_LEAST_INCREMENTS = 6
# What the median absolute deviation of a normal distribution is of its standard deviation.
_MAD = 0.6744897501960817


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: at which step, in which tensor (empty: in all of them), and in one line what."""

    kind: Literal["duplicate", "jump", "hole", "far"]
    step: int
    tensor: str
    text: str


def findings(gram: Gram) -> list[Finding]:
    """Return everything that looks wrong, by step."""
    return sorted([*far(gram), *duplicates(gram), *jumps(gram), *holes(gram.steps)], key=lambda finding: finding.step)


def refuse_duplicates(gram: Gram) -> None:
    """Raise DuplicateError for the first checkpoint that holds what the one before it holds."""
    for duplicate in duplicates(gram):
        raise DuplicateError(duplicate.text)


def duplicates(gram: Gram) -> list[Finding]:
    """Return the steps whose checkpoint is, bit for bit, the one before it."""
    pairs = pairwise(zip(gram.steps, gram.digests, strict=True))
    return [
        Finding(
            "duplicate",
            step,
            "",
            f"the checkpoint of step {step} holds the same weights as that of step {before}, bit for bit: one was saved"
            " under two names, or nothing was trained in between. Delete one of them.",
        )
        for (before, earlier), (step, later) in pairs
        if later == earlier
    ]


def far(gram: Gram) -> list[Finding]:
    """Return the first step if its checkpoint is so far from the base that it was hardly trained from it."""
    distance = float((gram.products[:, 0, 0].sum() / gram.base_norms.sum()).sqrt())
    if distance < FAR:
        return []
    return [
        Finding(
            "far",
            gram.steps[0],
            "",
            f"the checkpoint of step {gram.steps[0]} is {distance:.2f} times the base's norm away from it. Is this the"
            " base that the run was started from?",
        )
    ]


def increments(gram_TKK: Tensor) -> Tensor:
    """Return (T, K) the norms ||delta_k - delta_(k-1)||, the first one from the base."""
    square_TK = gram_TKK.diagonal(dim1=-2, dim2=-1)
    cross_TK = gram_TKK.diagonal(offset=1, dim1=-2, dim2=-1)
    later_TK = square_TK[:, 1:] - 2.0 * cross_TK + square_TK[:, :-1]
    return torch.cat([square_TK[:, :1], later_TK], dim=1).clamp(min=0.0).sqrt()


def jumps(gram: Gram) -> list[Finding]:
    """Return the steps at which the run as a whole moved far faster than it usually does, with the tensor that led."""
    norms_TK = increments(gram.products)
    rates_K = _rates(norms_TK.square().sum(0).sqrt(), gram.steps)
    findings = []
    for place in _outliers(rates_K):
        share_T = norms_TK[:, place].square() / norms_TK.square().sum(1).clamp(min=torch.finfo(torch.float64).tiny)
        tensor = gram.names[int(share_T.argmax())]
        ratio = float(rates_K[place] / rates_K.median())
        findings.append(
            Finding(
                "jump",
                gram.steps[place],
                tensor,
                f"step {gram.steps[place]}: the weights moved {ratio:.1f} times as fast as they usually do, {tensor}"
                " most of all. Did the learning rate change, or the run resume from elsewhere?",
            )
        )
    return findings


def holes(steps: Sequence[int]) -> list[Finding]:
    """Return the gaps in a step sequence that is regular otherwise; an irregular one has none."""
    gaps = [later - earlier for earlier, later in pairwise(steps)]
    if len(gaps) < 3:
        return []
    usual, count = Counter(gaps).most_common(1)[0]
    if 2 * count <= len(gaps):
        return []
    return [
        Finding(
            "hole",
            step,
            "",
            f"between steps {step - gap} and {step} checkpoints are missing ({gap // usual - 1} of them): the others"
            f" are {usual} steps apart. Were they deleted?",
        )
        for step, gap in zip(steps[1:], gaps, strict=True)
        if gap >= 2 * usual
    ]


def _rates(norms_K: Tensor, steps: Sequence[int]) -> Tensor:
    gaps_K = torch.tensor([later - earlier for earlier, later in pairwise([0, *steps])])
    return norms_K / gaps_K


def _outliers(rates_K: Tensor) -> list[int]:
    if len(rates_K) < _LEAST_INCREMENTS or not bool((rates_K > 0).all()):
        return []
    logs_K = rates_K.log()
    distance_K = logs_K - logs_K.median()
    deviation = distance_K.abs().median() / _MAD
    far_K = (distance_K > JUMP_DEVIATIONS * deviation) & (rates_K > JUMP_RATIO * rates_K.median())
    return [int(place) for place in far_K.nonzero().flatten()]
