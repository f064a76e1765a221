"""Whether the backtest of a run has converged, and which predictions it makes worth scoring.

One look at a run is easily lucky. The backtest is repeated on the run as it was at two earlier moments, each at most
10/11 of the next, from the same Gram: what all three trust is what has converged. Windows begin at the first checkpoint
here.
"""

from collections.abc import Sequence
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
# In multiples of the observed steps: what is nearer is hardly worth a model.
_LADDER = HORIZONS[1:]
# Two targets nearer than this are one.
_APART = 1.05

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
    """Return the predictions to score: of `methods` at `targets`, where None asks the backtest.

    Asked for methods it gives RELEX and the trusted way (pinned to the latest checkpoint where none is); asked for
    targets, multiples of the observed steps up to nine, what is trusted, and `total_steps`, beyond which it does not
    go. None when it says hold and was asked for targets.
    """
    if targets is None and convergence.state == "hold":
        return ()
    if targets is None:
        targets = _ladder(convergence, total_steps)
    if methods is None:
        methods = tuple(dict.fromkeys(("relex", "relex-pinned" if convergence.way is None else convergence.way.method)))
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


def _ladder(convergence: Convergence, total_steps: int | None) -> list[int]:
    last = convergence.backtest.steps[-1]
    wished = [round(last * (1.0 + horizon)) for horizon in _LADDER]
    end = min(wished[-1], total_steps or wished[-1])
    wished = [convergence.target_step or end, end, *wished]
    targets: list[int] = []
    for target in sorted(step for step in set(wished) if last < step <= end):
        if targets and target < _APART * targets[-1]:
            # The end of the run and what is trusted are wished for themselves.
            targets[-1] = min(target, targets[-1], key=wished.index)
        else:
            targets.append(target)
    return targets


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
