"""Whether the backtest of a run has converged, and which predictions it makes worth scoring.

One look at a run is easily lucky. The backtest is repeated on the run as it was at two earlier moments, each at most
10/11 of the next, from the same Gram: what all three trust is what has converged. Windows begin at the first checkpoint
here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from relex.backtest.backtest import Backtest, Cell, backtest
from relex.backtest.skill import HORIZONS, Way
from relex.gram import Gram
from relex.predictors import METHODS, parse_method
from relex.trajectory import Trajectory

# From one look to the next, in steps.
GROWTH = 1.1
_LOOKS = 3
# Of the jumps of a ladder: the first, in multiples of the observed steps, and each next one over the one before.
_NEAREST = HORIZONS[0]
_CLIMB = math.sqrt(2.0)
# Two targets nearer than this are one.
_APART = 1.05
# Where no end is planned: a thousand times the observed steps, for a benchmark on which nothing ever falls.
_MOST_RUNGS = 24

# What is climbed besides the way that the backtest trusts.
DIRECTIONS = ("relex", "secant")

State = Literal["trusted", "unsettled", "hidden", "hold"]


@dataclass(frozen=True)
class Convergence:
    """What the last looks say together.

    trusted: one way beats holding the latest checkpoint at `horizon` (multiple of the observed steps) in all of them;
    `target_step` is as far as such a jump was tested, `skill` and `lower_bound` (of the next jump, 95 %) are of the
    last look.
    unsettled: only the last look trusts anything. hidden: none does, and the checkpoints are stored in 16 bits, whose
    rounding hides small steps: the weights cannot tell, only scores can. hold: none does.
    """

    state: State
    backtest: Backtest
    looks: tuple[int, ...]
    way: Way | None
    horizon: float | None
    target_step: int | None
    skill: float | None
    lower_bound: float | None
    reason: str

    @property
    def converged(self) -> bool:
        """Whether more checkpoints are not needed to say how to go on."""
        return self.state == "trusted"


@dataclass(frozen=True)
class Proposal:
    """A prediction worth scoring: method spec, training step, and the trusted lower bound of its skill, if any."""

    method: str
    target_step: int
    skill_at_least: float | None


def converge(trajectory: Trajectory, gram: Gram, *, methods: Sequence[str] = ()) -> Convergence:
    """Look at the run as it is and as it was; no weight is read. Raises DuplicateError.

    Those of `methods` whose row says that they are backtested are, beside those that always are.
    """
    tested = [spec for spec in methods if METHODS[parse_method(spec).name].backtest == "yes"]
    looks = [backtest(gram.rows(range(row + 1)), methods=tested) for row in _rows(gram.steps)]
    latest = looks[-1]
    trusted = [{(cell.way, cell.horizon): cell for cell in look.cells if _is_trusted(cell)} for look in looks]
    common = set.intersection(*map(set, trusted)) if len(looks) == _LOOKS else set()
    ends = tuple(look.steps[-1] for look in looks)
    if agreed := common or set(trusted[-1]):
        # In the order of the cells, so that of equals it is always the same one.
        best = max(
            (cell for key, cell in trusted[-1].items() if key in agreed),
            key=lambda cell: (cell.horizon, cell.lower_bound or 0.0),
        )
        return _of("trusted" if common else "unsettled", latest, ends, best)
    why = latest.recommendation.reason
    if latest.recommendation.way is not None:
        why = "only windows that begin later than the first checkpoint beat the latest checkpoint."
    if _in_16_bits(trajectory):
        why += (
            " The checkpoints are stored in 16 bits: rounding hides steps this small, so that weights cannot tell, only"
            " scores can. Save fp32, if the trainer can."
        )
        return Convergence("hidden", latest, ends, None, None, None, None, None, why)
    return Convergence("hold", latest, ends, None, None, None, None, None, why)


def propose(
    convergence: Convergence,
    *,
    methods: Sequence[str] | None,
    targets: Sequence[int] | None,
    total_steps: int | None = None,
) -> tuple[Proposal, ...]:
    """Return the predictions to score, by method from the nearest: of `methods` at `targets`, None asks the backtest.

    Asked for methods it gives RELEX, the secant and the trusted way. Asked for targets it gives a ladder, to be climbed
    while scores last: the jumps grow by about √2 up to `total_steps`, or far beyond what a line can hold. None when it
    says hold and was asked for targets.
    """
    if targets is None and convergence.state == "hold":
        return ()
    if targets is None:
        targets = tuple(rungs(convergence.backtest.steps[-1], total_steps))
    if methods is None:
        trusted = () if convergence.way is None else (convergence.way.method,)
        methods = tuple(dict.fromkeys((*DIRECTIONS, *trusted)))
    return tuple(
        Proposal(method, target, _bound(convergence, method, target)) for method in methods for target in targets
    )


def _rows(steps: Sequence[int]) -> list[int]:
    rows = [len(steps) - 1]
    while len(rows) < _LOOKS:
        earlier = [row for row in range(rows[0]) if steps[row] * GROWTH <= steps[rows[0]]]
        if not earlier:
            break
        rows.insert(0, earlier[-1])
    return rows


def _is_trusted(cell: Cell) -> bool:
    return cell.trusted and cell.way.start == 0


def _of(state: Literal["trusted", "unsettled"], latest: Backtest, ends: tuple[int, ...], cell: Cell) -> Convergence:
    last = latest.steps[-1]
    target = cell.reach(last)
    seen = (
        f"after {', '.join(map(str, ends[:-1]))} and {last} steps" if state == "trusted" else f"only after {last} steps"
    )
    reason = (
        f"{cell.way.method} beat the latest checkpoint at {cell.horizon:g} times the observed steps {seen}: skill"
        f" {cell.skill:.2f} so far, {cell.lower_bound:.2f} or more next (95 %, if the run bends no more than it did),"
        f" tested up to a jump to step {target}."
    )
    return Convergence(state, latest, ends, cell.way, cell.horizon, target, cell.skill, cell.lower_bound, reason)


def rungs(last: int, total_steps: int | None) -> Iterator[int]:
    """Yield the targets of a ladder from step `last`, the nearest first: to `total_steps`, or far beyond any line."""
    before = last
    for rung in range(_MOST_RUNGS):
        target = max(last + round(max(1.0, _NEAREST * last) * _CLIMB**rung), before + 1)
        if total_steps is not None and total_steps < _APART * target:
            yield total_steps
            return
        yield target
        before = target


def _bound(convergence: Convergence, method: str, target: int) -> float | None:
    if convergence.state != "trusted" or convergence.target_step is None or target > convergence.target_step:
        return None
    last = convergence.backtest.steps[-1]
    # However it is written: relex-pinned is relex-pinned:damping=1.
    predictor = parse_method(method).predictor
    reaching = [
        cell
        for cell in convergence.backtest.cells
        if _is_trusted(cell) and parse_method(cell.way.method).predictor == predictor and target <= cell.reach(last)
    ]
    return min(reaching, key=lambda cell: cell.horizon).lower_bound if reaching else None


def _in_16_bits(trajectory: Trajectory) -> bool:
    moving = [spec for spec in trajectory.tensors if spec.moves and not spec.relative and not spec.unchanged]
    coarse = sum(spec.count for spec in moving if spec.dtype in (torch.bfloat16, torch.float16))
    return 2 * coarse > sum(spec.count for spec in moving)
