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
    `target_step` is as far as such a jump was tested, `skill` and `lower_bound` (one-sided 95 %) are of the last look.
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


def converge(trajectory: Trajectory, gram: Gram) -> Convergence:
    """Look at the run as it is and as it was; no weight is read. Raises DuplicateError."""
    looks = [backtest(gram.rows(range(row + 1))) for row in _rows(gram.steps)]
    latest = looks[-1]
    trusted = [{(cell.way, cell.horizon): cell for cell in look.cells if _is_trusted(cell)} for look in looks]
    common = set.intersection(*map(set, trusted)) if len(looks) == _LOOKS else set()
    ends = tuple(look.steps[-1] for look in looks)
    if found := common or set(trusted[-1]):
        best = max((trusted[-1][key] for key in found), key=lambda cell: (cell.horizon, cell.lower_bound or 0.0))
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
    found: Convergence,
    *,
    methods: Sequence[str] | None,
    targets: Sequence[int] | None,
    total_steps: int | None = None,
) -> tuple[Proposal, ...]:
    """Return the predictions to score: of `methods` at `targets`, where None asks the backtest.

    Its methods are RELEX and the trusted way (pinned to the latest checkpoint where none is), its targets multiples of
    the observed steps up to nine, what is trusted, and `total_steps`, beyond which it does not go. None when it says
    hold and was asked for targets.
    """
    if targets is None and found.state == "hold":
        return ()
    if targets is None:
        targets = _ladder(found, total_steps)
    if methods is None:
        methods = tuple(dict.fromkeys(("relex", "relex-pinned" if found.way is None else found.way.method)))
    return tuple(Proposal(method, target, _bound(found, method, target)) for method in methods for target in targets)


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
        f"{cell.way.method} beats the latest checkpoint at {cell.horizon:g} times the observed steps {seen}: skill"
        f" {cell.skill:.2f}, at least {cell.lower_bound:.2f} (95 %), tested up to a jump to step {target}."
    )
    return Convergence(state, latest, ends, cell.way, cell.horizon, target, cell.skill, cell.lower_bound, reason)


def _ladder(found: Convergence, total_steps: int | None) -> list[int]:
    last = found.backtest.steps[-1]
    wished = [round(last * (1.0 + horizon)) for horizon in _LADDER]
    end = min(wished[-1], total_steps or wished[-1])
    wished = [found.target_step or end, end, *wished]
    targets: list[int] = []
    for target in sorted(step for step in set(wished) if last < step <= end):
        if targets and target < _APART * targets[-1]:
            # The end of the run and what is trusted are wished for themselves.
            targets[-1] = min(target, targets[-1], key=wished.index)
        else:
            targets.append(target)
    return targets


def _bound(found: Convergence, method: str, target: int) -> float | None:
    if found.state != "trusted" or found.target_step is None or target > found.target_step:
        return None
    last = found.backtest.steps[-1]
    reaching = [
        cell
        for cell in found.backtest.cells
        if _is_trusted(cell) and cell.way.method == method and target <= cell.reach(last)
    ]
    return min(reaching, key=lambda cell: cell.horizon).lower_bound if reaching else None


def _in_16_bits(trajectory: Trajectory) -> bool:
    moving = [spec for spec in trajectory.tensors if spec.moves and not spec.relative and not spec.unchanged]
    coarse = sum(spec.count for spec in moving if spec.dtype in (torch.bfloat16, torch.float16))
    return 2 * coarse > sum(spec.count for spec in moving)
