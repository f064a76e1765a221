"""How far a run can be trusted to extrapolate, told from its observed steps alone.

From rolling origins inside the run, ways to extrapolate (see `skill`; other methods where they are asked for) are read
at checkpoints that were observed too. A way is trusted at a horizon when the run has a direction, and when the lower
bound of its next jump's skill is above 0: for a jump like those seen, and for a trend among them that goes on.

A run has a direction when it has come further from its base than 97.5 % of runs without one. Those are this one with
the signs of its increments drawn at random, block by block: under a random walk they are as probable as the run itself,
so that on it the answer is "hold" more than 19 times in 20, however many ways are tried. How far one has come is its
squared net displacement, 1ᵀM1 with M the products of the increments.

Shape suffixes: T = tensors that move, K = checkpoints, B = runs without direction.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from relex import sanity
from relex.backtest.skill import Jumps, Way, jumps, tried
from relex.files.block_cache import BlockCache
from relex.gram import Gram, cached
from relex.interval import norm_band
from relex.predictors import parse_method
from relex.trajectory import open_run

# Runs without direction, and in how many blocks at most the signs of each are drawn: neighbouring increments of an
# optimiser with momentum are alike without being a direction.
_RUNS = 399
_BLOCKS = 16
# Half of what the answer may be wrong on a random walk: the runs are a sample, and so is every check of them.
_CHANCE = 0.025
# Of fewer increments too few signs can be drawn to exclude chance.
FEWEST = 7


@dataclass(frozen=True)
class Cell:
    """One way at one horizon (a multiple of the observed steps), all tensors together, averaged over origins.

    `lower_bound` is the one-sided 95 % bound of the next jump's skill (see `Jumps.lower_bound`), None where no two are
    apart; `jumps` counts those that are. `longest` is the longest jump in steps. `trusted` says that the bound is above
    0 and that the run has a direction.
    `by_tensor` is the skill of each tensor, in the order of the names; None where it stood still.
    """

    way: Way
    horizon: float
    skill: float
    lower_bound: float | None
    cosine: float
    norm_ratio: float
    jumps: int
    longest: int
    trusted: bool
    by_tensor: tuple[float | None, ...]

    def reach(self, last: int) -> int:
        """Return how far a jump from step `last` was tested: the horizon, or as far as the longest jump."""
        return min(last + self.longest, round(last * (1.0 + self.horizon)))


@dataclass(frozen=True)
class Recommendation:
    """What to do, and why in one line. Method "hold", without a way: none beats the latest checkpoint for sure.

    `start` is the first training step the window should have. `horizon` is the furthest trusted multiple of the
    observed steps; `target_step` is as far as a jump of as many steps was tested. `norm_band` is the 90 % interval of
    the delta's norm there, over the latest one's, if the run goes on along a line (the wider of two, see `interval`).
    All three are None for hold.
    """

    way: Way | None
    method: str
    start: int
    horizon: float | None
    target_step: int | None
    norm_band: tuple[float, float] | None
    reason: str


@dataclass(frozen=True)
class Backtest:
    """Every cell, and the recommendation. `methods` were tried; one that fits no window has no cell.

    `chance` is the share of runs without direction that come as far as this one, itself among them; None where there
    is nothing to test.
    """

    steps: tuple[int, ...]
    names: tuple[str, ...]
    methods: tuple[str, ...]
    cells: tuple[Cell, ...]
    chance: float | None
    recommendation: Recommendation

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; of a way also the name of the method (`form`) and its damping."""
        content = asdict(self)
        for way in [content["recommendation"]["way"], *(cell["way"] for cell in content["cells"])]:
            if way is not None:
                method = parse_method(way["method"])
                way |= {"form": method.name, "damping": method.parameters.get("damping", 1.0)}
        return content


def backtest(gram: Gram, *, methods: Sequence[str] = (), seed: int = 0) -> Backtest:
    """Test ways to extrapolate on the observed checkpoints; no weight is read.

    `methods` are tried beside those that always are: the more there are, the more it takes to be trusted. `seed` draws
    the runs without direction. Raises DuplicateError for a checkpoint that holds what another one does, TargetError for
    a method that has no backtest.
    """
    specs = tried(methods)
    sanity.refuse_duplicates(gram)
    chance = share_as_far(gram.products.sum(0), seed=seed)
    directed = chance is not None and chance <= _CHANCE
    cells = tuple(
        _cell(way, horizon, made, last=gram.steps[-1], directed=directed)
        for (way, horizon), made in jumps(gram.products, gram.steps, specs).items()
    )
    return Backtest(gram.steps, gram.names, specs, cells, chance, _recommend(gram, cells, chance))


def backtest_run(
    run: str | Path,
    base: str | Path,
    *,
    grams: Path,
    memory: int,
    threads: int,
    window: int | None = None,
    methods: Sequence[str] = (),
    blocks: BlockCache | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Backtest:
    """Backtest the checkpoints of a training run at steps up to `window` (None: all), with `methods` beside the usual.

    `blocks` is where what is read from a URL is kept meanwhile. Raises RelexError.
    """
    tried(methods)
    trajectory = open_run(run, base, window=window, blocks=blocks)
    gram = cached(trajectory, grams, memory=memory, threads=threads, on_progress=on_progress)
    return backtest(gram, methods=methods)


def _cell(way: Way, horizon: float, made: Jumps, *, last: int, directed: bool) -> Cell:
    whole = made.pooled()
    bound = float(whole.lower_bound(last)[0])
    missed_T, held_T = made.missed.sum(0), made.held.sum(0)
    return Cell(
        way,
        horizon,
        skill=float(whole.skill().mean()),
        lower_bound=bound if bound > -torch.inf else None,
        cosine=float((whole.inner / (whole.predicted * whole.real).sqrt().clamp(min=1e-300)).mean()),
        norm_ratio=float((whole.predicted / whole.real.clamp(min=1e-300)).sqrt().mean()),
        jumps=made.independent(),
        longest=max(target - origin for origin, target in zip(made.origins, made.targets, strict=True)),
        trusted=directed and bound > 0,
        by_tensor=tuple(
            1.0 - missed / held if held > 0 else None
            for missed, held in zip(missed_T.tolist(), held_T.tolist(), strict=True)
        ),
    )


def share_as_far(gram_KK: Tensor, *, seed: int) -> float | None:
    """Return the share of runs without direction that come as far from the base as this one; None with too few steps.

    The run itself is one of those that were drawn.
    """
    count = len(gram_KK)
    if count < FEWEST:
        return None
    size = -(-count // _BLOCKS)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 2, (_RUNS, -(-count // size)), generator=generator).double() * 2.0 - 1.0
    signs_BK = torch.cat([torch.ones(1, count, dtype=torch.float64), drawn.repeat_interleave(size, 1)[:, :count]])
    sums_KK = torch.ones(count, count, dtype=torch.float64).tril()
    increments_KK = torch.linalg.solve_triangular(sums_KK, gram_KK, upper=False, unitriangular=True)
    increments_KK = torch.linalg.solve_triangular(sums_KK, increments_KK.mT, upper=False, unitriangular=True)
    far_B = ((signs_BK @ increments_KK) * signs_BK).sum(1)
    # All signs turned round are the run again, to the last bits.
    return float((far_B >= far_B[0] * (1.0 - 1e-9)).double().mean())


def _recommend(gram: Gram, cells: tuple[Cell, ...], chance: float | None) -> Recommendation:
    steps = gram.steps
    trusted = [cell for cell in cells if cell.trusted]
    if not trusted:
        return Recommendation(None, "hold", steps[0], None, None, None, _why_hold(steps, cells, chance))
    best = max(trusted, key=lambda cell: (cell.horizon, cell.lower_bound or 0.0))
    last = steps[-1]
    start = next(step for step in steps if step >= best.way.start * last)
    target, wished = last + best.longest, round(last * (1.0 + best.horizon))
    reason = (
        f"at {best.horizon:g} times the observed steps it beat the latest checkpoint: skill {best.skill:.2f} so far,"
        f" {best.lower_bound:.2f} or more next (95 %, {best.jumps} jumps that do not overlap) if the run bends no more"
        " than it did."
    )
    if wished > target:
        reason += (
            f" No jump longer than {best.longest} steps was tested, so beyond step {target} (to"
            f" {wished}, {best.horizon:g} times) it is the pattern that is trusted, not a test."
        )
    target = best.reach(last)
    band = _norm_band(gram, start, target)
    return Recommendation(best.way, best.way.method, start, best.horizon, target, band, reason)


def _norm_band(gram: Gram, start: int, target: int) -> tuple[float, float] | None:
    window = gram.rows(range(gram.steps.index(start), len(gram.steps)))
    steps_K = torch.tensor(window.steps, dtype=torch.float64)
    latest = float(window.products[:, -1, -1].sum().sqrt())
    band = norm_band(window.products, steps_K, target)
    return (band[0] / latest, band[1] / latest) if band is not None else None


def _why_hold(steps: tuple[int, ...], cells: tuple[Cell, ...], chance: float | None) -> str:
    bounded = [cell for cell in cells if cell.lower_bound is not None]
    if chance is None or not bounded:
        return (
            f"{len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}: too few to tell a direction from chance, or"
            " none is early enough to jump from: save more often, or train on."
        )
    best = max(bounded, key=lambda cell: cell.lower_bound or 0.0)
    nearest = f"the best, {best.way.method} at {best.horizon:g} times the observed steps, has skill {best.skill:.2f}"
    if chance <= _CHANCE:
        return f"no way beats the latest checkpoint for sure: {nearest}, next {best.lower_bound:.2f} or more (95 %)."
    return f"{nearest}, and {100 * chance:.2g} % of runs without direction come as far as this one."
