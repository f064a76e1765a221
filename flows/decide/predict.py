"""From the observed steps of one window to candidate model directories, in one pass for all methods and targets."""

from collections.abc import Sequence
from dataclasses import dataclass

from flows.errors import WindowError
from flows.settings import Settings
from flows.state.decision import Backtested, Model
from flows.state.snapshot import look_at
from flows.state.windows import window_directory, window_key
from relex.backtest.convergence import Convergence, converge, propose
from relex.extrapolation import Request, extrapolate
from relex.files.block_cache import BlockCache
from relex.forecast import check_target
from relex.gram import cached
from relex.layouts.weights import Weights
from relex.output.shards import Spread
from relex.predictors import parse_method
from relex.progress import Tell, telling
from relex.store import StoredCheckpoint, observed
from relex.trajectory import Trajectory, open_trajectory


@dataclass(frozen=True)
class Predicted:
    """The last observed checkpoint and the candidates as directories, what looks wrong, and what the backtest says.

    `written` is when each observed checkpoint was written, as the ledger has it (ns since the epoch).
    """

    observed: Model
    candidates: tuple[Model, ...]
    warnings: tuple[str, ...]
    backtested: Backtested
    written: tuple[int, ...] = ()


def predict(
    settings: Settings,
    steps: Sequence[int],
    key: str,
    *,
    blocks: BlockCache | None = None,
    spread: Spread | None = None,
    tell: Tell | None = None,
) -> Predicted:
    """Backtest the window of `steps`, and write the last observed checkpoint and every candidate.

    The models are directories that are there when this returns. The last observed checkpoint is copied too: the trainer
    may prune it, and its copy has the base's tokenizer and precision like the candidates. `spread` hands the writing to
    other processes. Raises WindowError when the store no longer holds what the window was announced with, and
    RelexError.
    """
    run = look_at(settings, settings.store, blocks=blocks)
    inside = [checkpoint for checkpoint in run.newest if checkpoint.step <= max(steps)]
    actual_key = window_key(settings, run.base, inside)
    if actual_key != key:
        raise WindowError(
            f"window {key} was announced with steps {list(steps)}, the store and the settings now make it {actual_key}"
            f" with steps {[checkpoint.step for checkpoint in inside]}. The watcher announces that one; nothing is left"
            " to do here."
        )
    trajectory, converged = backtest_window(settings, run.base, inside, tell=tell)
    last = trajectory.steps[-1]
    proposed = propose(
        converged,
        methods=None if settings.methods == "auto" else settings.methods,
        targets=None if settings.targets == "auto" else settings.targets,
        total_steps=settings.total_steps,
    )
    directory = window_directory(settings, key) / "models"
    requests = [Request(parse_method("hold"), last, directory / "observed" / f"step-{last}")]
    for proposal in proposed:
        check_target(proposal.target_step, trajectory.steps)
        method = parse_method(proposal.method)
        requests.append(
            Request(method, proposal.target_step, directory / method.directory / f"step-{proposal.target_step}")
        )
    forecasts = extrapolate(
        trajectory,
        requests,
        grams=settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
        shard_size=settings.shard_size,
        spread=spread,
        tell=tell,
    )
    candidates = tuple(
        Model(
            "candidate",
            proposal.target_step,
            str(request.directory),
            request.method.spec,
            made.digest,
            proposal.skill_at_least,
        )
        for proposal, request, made in zip(proposed, requests[1:], forecasts[1:], strict=True)
    )
    observed_model = Model("observed", last, str(requests[0].directory))
    written = tuple(run.known[str(checkpoint.step)].written for checkpoint in inside)
    return Predicted(observed_model, candidates, forecasts[0].warnings, _backtested(converged), written)


def backtest_window(
    settings: Settings, base: Weights, inside: Sequence[StoredCheckpoint], *, tell: Tell | None = None
) -> tuple[Trajectory, Convergence]:
    """Open the checkpoints of one window and backtest them; what was measured is kept. Raises RelexError."""
    trajectory = open_trajectory(base, observed(inside, settings.store))
    gram = cached(
        trajectory,
        settings.home / "grams",
        memory=int(settings.memory),
        threads=settings.threads,
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
