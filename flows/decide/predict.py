"""From the observed steps of one window to candidate model directories, in one pass for all methods and targets."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.errors import WindowError
from flows.settings import Settings
from flows.state.decision import Backtested, Model
from flows.state.snapshot import Snapshot, look_at
from flows.state.windows import window_directory, window_key
from relex.backtest.convergence import Convergence, Proposal, converge, propose
from relex.extrapolation import Request, extrapolate
from relex.files.block_cache import BlockCache
from relex.forecast import check_target
from relex.gram import cached
from relex.layouts.named_base import foreign_base
from relex.layouts.weights import Weights
from relex.output.shards import Spread
from relex.predictors import parse_method
from relex.progress import Tell, telling
from relex.ranges import Share
from relex.store import StoredCheckpoint, observed
from relex.trajectory import Trajectory, open_trajectory


@dataclass(frozen=True)
class Predicted:
    """The last observed checkpoint and the candidates as directories, what looks wrong, and what the backtest says.

    Where targets are left to the backtest there are no candidates yet, but the rungs of a ladder. `written` is when
    each observed checkpoint was written, as the ledger has it (ns since the epoch).
    """

    observed: Model
    candidates: tuple[Model, ...]
    warnings: tuple[str, ...]
    backtested: Backtested
    written: tuple[int, ...] = ()
    ladder: tuple[Proposal, ...] = ()


def predict(
    settings: Settings,
    steps: Sequence[int],
    key: str,
    *,
    blocks: BlockCache | None = None,
    spread: Spread | None = None,
    share: Share | None = None,
    tell: Tell | None = None,
) -> Predicted:
    """Backtest the window of `steps`, and write the last observed checkpoint and every candidate at a given target.

    The models are directories that are there when this returns. The last observed checkpoint is copied too: the trainer
    may prune it, and its copy has the base's tokenizer and precision like the candidates. `share` and `spread` hand the
    reading and the writing to other processes. Raises WindowError when the store no longer holds what the window was
    announced with, and RelexError.
    """
    run, inside = _inside(settings, steps, key, blocks=blocks)
    trajectory, converged = backtest_window(settings, run.base, inside, share=share, tell=tell)
    last = trajectory.steps[-1]
    proposed = propose(
        converged,
        methods=None if settings.methods == "auto" else settings.methods,
        targets=None if settings.targets == "auto" else settings.targets,
        total_steps=settings.total_steps,
    )
    for proposal in proposed:
        check_target(proposal.target_step, trajectory.steps)
    # Rungs of a ladder are written when they are reached.
    at_once = () if settings.targets == "auto" else proposed
    directory = window_directory(settings, key) / "models"
    observed_model = Request(parse_method("hold"), last, directory / "observed" / f"step-{last}")
    written, warnings = _write(settings, key, trajectory, at_once, [observed_model], spread=spread, tell=tell)
    warning = foreign_base([checkpoint.weights for checkpoint in inside if checkpoint.weights is not None])
    return Predicted(
        Model("observed", last, str(observed_model.directory)),
        written,
        (*warnings, *filter(None, [warning])),
        _backtested(converged),
        tuple(run.known[str(checkpoint.step)].written for checkpoint in inside),
        () if at_once else proposed,
    )


def write_rungs(
    settings: Settings,
    steps: Sequence[int],
    key: str,
    proposals: Sequence[Proposal],
    *,
    blocks: BlockCache | None = None,
    spread: Spread | None = None,
    tell: Tell | None = None,
) -> tuple[Model, ...]:
    """Write some rungs of the window's ladder in one pass, those that are there already excepted; see `predict`."""
    run, inside = _inside(settings, steps, key, blocks=blocks)
    trajectory = open_trajectory(run.base, observed(inside, settings.store))
    return _write(settings, key, trajectory, proposals, [], spread=spread, tell=tell)[0]


def _inside(
    settings: Settings, steps: Sequence[int], key: str, *, blocks: BlockCache | None
) -> tuple[Snapshot, list[StoredCheckpoint]]:
    run = look_at(settings, settings.store, blocks=blocks)
    inside = [checkpoint for checkpoint in run.newest if checkpoint.step <= max(steps)]
    actual_key = window_key(settings, run.base, inside)
    if actual_key != key:
        raise WindowError(
            f"window {key} was announced with steps {list(steps)}, the store and the settings now make it {actual_key}"
            f" with steps {[checkpoint.step for checkpoint in inside]}. The watcher announces that one; nothing is left"
            " to do here."
        )
    return run, inside


def _write(
    settings: Settings,
    key: str,
    trajectory: Trajectory,
    proposals: Sequence[Proposal],
    others: Sequence[Request],
    *,
    spread: Spread | None,
    tell: Tell | None,
) -> tuple[tuple[Model, ...], tuple[str, ...]]:
    """Write the proposals and `others` in one pass; return the models of the first, and what looks wrong."""
    directory = window_directory(settings, key) / "models"
    requests = []
    for proposal in proposals:
        method = parse_method(proposal.method)
        place = directory / method.directory / f"step-{proposal.target_step}"
        requests.append(Request(method, proposal.target_step, place))
    forecasts = extrapolate(
        trajectory,
        [*requests, *others],
        grams=settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
        dtype=settings.output_dtype,
        shard_size=settings.shard_size,
        spread=spread,
        tell=tell,
    )
    models = tuple(
        Model(
            "candidate",
            proposal.target_step,
            str(request.directory),
            request.method.spec,
            made.digest,
            proposal.skill_at_least,
        )
        for proposal, request, made in zip(proposals, requests, forecasts, strict=False)
    )
    return models, forecasts[0].warnings


def backtest_window(
    settings: Settings,
    base: Weights,
    inside: Sequence[StoredCheckpoint],
    *,
    share: Share | None = None,
    tell: Tell | None = None,
) -> tuple[Trajectory, Convergence]:
    """Open the checkpoints of one window and backtest them; what was measured is kept. Raises RelexError."""
    trajectory = open_trajectory(base, observed(inside, settings.store))
    gram = cached(
        trajectory,
        settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
        share=share,
        on_progress=telling(tell, "reading"),
    )
    return trajectory, converge(trajectory, gram, methods=() if settings.methods == "auto" else settings.methods)


def _backtested(convergence: Convergence) -> Backtested:
    return Backtested(
        convergence.state,
        convergence.looks,
        "" if convergence.way is None else convergence.way.method,
        convergence.horizon,
        convergence.skill,
        convergence.lower_bound,
        convergence.target_step if convergence.state == "trusted" else None,
        convergence.reason,
    )
