"""When a window of a run is due for a decision: at a step that was given, or when its backtest has converged.

With `window: auto` the backtest is repeated each time the run has grown by a tenth. A window is due when three looks
agree (see relex.backtest.convergence), or at max_window. After a refusal the next one is due once half as many steps
again have been observed; every window that goes to the gate spends one of `attempts`.
The last look is in `look.json`, so that its window stays due until it is decided.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from flows.decide.predict import backtest_window
from flows.settings import Settings
from flows.state.ledger import Seen
from flows.state.records import read_json, write_json
from flows.state.windows import decided, decisions_of, key_up_to
from relex.backtest.convergence import GROWTH
from relex.errors import RelexError, UnreachableError
from relex.layouts.weights import Weights
from relex.progress import Tell
from relex.store import State, StoredCheckpoint

# A refused run is looked at again when it has shown so much more.
REARM_GROWTH = 1.5


@dataclass(frozen=True)
class DueWindow:
    """The last step of the window that is due (None: none is), and one line for a reader.

    `closed` says that it is decided, and that nothing more will be decided on this run as it is.
    """

    end: int | None
    text: str = ""
    closed: bool = False


@dataclass(frozen=True)
class _Look:
    """The backtest of the steps up to `step`, by the name of the window it would decide; `due` says that it does."""

    step: int
    key: str
    due: bool
    reason: str


def arm(
    settings: Settings,
    base: Weights,
    newest: Sequence[StoredCheckpoint],
    checkpoints: Mapping[str, Seen],
    *,
    tell: Tell | None = None,
) -> DueWindow:
    """Return what is due; `newest` is the newest segment of the store, `checkpoints` what is known of it.

    For an automatic window this reads weights, each time the run has grown by a tenth.
    """
    identities = {int(step): seen.identity for step, seen in checkpoints.items()}
    if settings.window != "auto":
        key = key_up_to(settings, base, identities, settings.window)
        return DueWindow(settings.window, closed=decided(settings, key))
    ready = _ready(newest, settings.end)
    reached = any(checkpoint.step >= settings.end and checkpoint.state is State.READY for checkpoint in newest)
    final = reached and len(ready) == sum(checkpoint.step <= settings.end for checkpoint in newest)
    last = ready[-1].step if len(ready) > 1 else 0
    decisions = decisions_of(settings, base, identities)
    gated = [decision for decision in decisions if decision.gates]
    refused = max((decision.window for decision in decisions), default=0)
    if any(decision.verdict == "registered" for decision in decisions):
        return DueWindow(refused, f"registered from step {refused}", closed=True)
    if len(gated) >= settings.attempts:
        return DueWindow(refused, f"{len(gated)} of {settings.attempts} attempts at the gate are spent", closed=True)
    if final and refused == last:
        return DueWindow(refused, f"refused at step {refused}, the last one that is observed", closed=True)
    look = _read(settings)
    if look is not None and look.key != key_up_to(settings, base, identities, look.step):
        look = None
    if look is not None and look.due and not decided(settings, look.key):
        return DueWindow(look.step, look.reason)
    if last == 0:
        return DueWindow(None, "too few checkpoints to backtest")
    if not final and last < REARM_GROWTH * refused:
        return DueWindow(None, f"refused at step {refused}; looked at again from step {round(REARM_GROWTH * refused)}")
    if look is None or final or last >= GROWTH * look.step:
        look = _look(settings, base, ready, key_up_to(settings, base, identities, last), final=final, tell=tell)
        write_json(settings.home / "look.json", asdict(look))
    return DueWindow(look.step if look.due else None, f"backtest at step {look.step}: {look.reason}")


def _ready(newest: Sequence[StoredCheckpoint], end: int) -> list[StoredCheckpoint]:
    """Return the checkpoints up to `end` before the first that is not ready."""
    ready: list[StoredCheckpoint] = []
    for checkpoint in newest:
        if checkpoint.state is not State.READY or checkpoint.step > end:
            break
        ready.append(checkpoint)
    return ready


def _look(
    settings: Settings,
    base: Weights,
    ready: Sequence[StoredCheckpoint],
    key: str,
    *,
    final: bool,
    tell: Tell | None,
) -> _Look:
    step = ready[-1].step
    try:
        _, convergence = backtest_window(settings, base, ready, tell=tell)
    except UnreachableError:
        raise
    except RelexError as error:
        # At the end the decision says so; before it, more checkpoints may help.
        return _Look(step, key, due=final, reason=str(error))
    return _Look(step, key, due=final or convergence.converged, reason=convergence.reason)


def _read(settings: Settings) -> _Look | None:
    path = settings.home / "look.json"
    return read_json(path, _Look) if path.is_file() else None
