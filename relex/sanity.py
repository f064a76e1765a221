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
# The cosine of a turn back between two increments. In 2,252 windows of two recorded GRPO runs none is below 0.26, in
# 108 small runs of AdamW and SGD none below -0.15; a step of another seed's run among theirs usually has -0.6 to -0.95.
TURN = -0.3
# The same between the last increment, or the first but one, and the way before it: nothing comes back from there.
TURN_AT_END = -0.2
_LEAST_TURN = 5
# Of fewer increments no distribution can be told.
_LEAST_INCREMENTS = 6
# What the median absolute deviation of a normal distribution is of its standard deviation.
_MAD = 0.6744897501960817


@dataclass(frozen=True)
class Finding:
    """One thing that looks wrong: at which step, in which tensor (empty: in all of them), and in one line what."""

    kind: Literal["duplicate", "jump", "hole", "far", "foreign", "base"]
    step: int
    tensor: str
    text: str


def findings(gram: Gram) -> list[Finding]:
    """Return everything that looks wrong, by step."""
    findings = [*far(gram), *duplicates(gram), *jumps(gram), *foreign(gram), *holes(gram.steps)]
    return sorted(findings, key=lambda finding: finding.step)


def refuse_duplicates(gram: Gram) -> None:
    """Raise DuplicateError for the first checkpoint that holds what one before it holds."""
    for duplicate in duplicates(gram):
        raise DuplicateError(duplicate.text)


def duplicates(gram: Gram) -> list[Finding]:
    """Return the steps whose checkpoint is, bit for bit, an earlier one."""
    latest: dict[str, int] = {}
    findings = []
    for place, (step, digest) in enumerate(zip(gram.steps, gram.digests, strict=True)):
        if digest in latest:
            between = gram.steps[latest[digest] + 1 : place]
            findings.append(_duplicate(step, gram.steps[latest[digest]], between))
        latest[digest] = place
    return findings


def _duplicate(step: int, earlier: int, between: Sequence[int]) -> Finding:
    same = (
        f"the checkpoint of step {step} holds the same weights as that of step {earlier}, bit for bit: one was saved"
        " under two names, or "
    )
    if between:
        others = f"{between[0]} to {between[-1]}" if len(between) > 1 else f"{between[0]}"
        why = (
            f"the run was rolled back. Delete step {step}, or, if it went on from there, steps {earlier} and {others}."
        )
    else:
        why = "nothing was trained in between. Delete one of them."
    return Finding("duplicate", step, "", same + why)


def far(gram: Gram) -> list[Finding]:
    """Return the first step if its checkpoint is so far from the base that it was hardly trained from it."""
    moved_T = gram.products[:, 0, 0] > 0.0
    if not bool(moved_T.any()):
        return []
    # What is alike in all models, as the weights of norms are, says nothing: they did not move, or are outnumbered.
    squares_T, norms_T = gram.products[moved_T, 0, 0], gram.base_norms[moved_T]
    pooled, middle = (squares_T.sum() / norms_T.sum()).sqrt(), (squares_T / norms_T).sqrt().median()
    distance = float(torch.maximum(pooled, middle))
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


def foreign(gram: Gram) -> list[Finding]:
    """Return the step, of at least five, that the run goes to and comes back from, as to one of another run.

    A run that turns back again and again, as one that only jitters, has none.
    """
    count = len(gram.steps)
    if count < _LEAST_TURN:
        return []
    gram_KK = gram.products.sum(0)
    away_KK = torch.eye(count, dtype=torch.float64) - torch.eye(count, dtype=torch.float64).roll(1, 0).tril()
    turns_K = _cosines(away_KK[:-1], away_KK[1:], gram_KK)
    # The way so far against the last increment.
    end = float(_cosines(torch.eye(count, dtype=torch.float64)[-2:-1], away_KK[-1:], gram_KK))
    place = int(turns_K.argmin())
    turn = float(turns_K[place])
    others = torch.cat([turns_K[:place], turns_K[place + 1 :]]).median()
    if not (turn < (TURN if place > 0 else TURN_AT_END) and float(others) > 0.5 * TURN):
        if not (end < TURN_AT_END and float(turns_K.median()) > 0.5 * TURN):
            return []
        place, turn = count - 1, end
    # From the last one nothing comes back, and the turn may be before it.
    steps = f"step {gram.steps[place]}" + (f", or {gram.steps[-1]}" if place == count - 2 else "")
    return [
        Finding(
            "foreign",
            gram.steps[place],
            "",
            f"{steps}: the weights turn back there (cosine {turn:.2f} between the way to it and the way from it, or"
            " the way before it), as they do at a checkpoint of another run. Is it of this one?",
        )
    ]


def _cosines(ones_NK: Tensor, others_NK: Tensor, gram_KK: Tensor) -> Tensor:
    """Return the (N,) cosines between combinations of deltas; 0 where one of the two is no way at all."""
    inner_N = (ones_NK @ gram_KK * others_NK).sum(1)
    squares_N = (ones_NK @ gram_KK * ones_NK).sum(1) * (others_NK @ gram_KK * others_NK).sum(1)
    return torch.where(squares_N > 0.0, inner_N / squares_N.clamp(min=torch.finfo(torch.float64).tiny).sqrt(), 0.0)


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
