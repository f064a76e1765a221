"""Which candidate goes to the gate, by its score on all selection problems."""

from collections.abc import Sequence

from flows.state.decision import Score


def choose(selection: Sequence[Score], *, margin: float) -> tuple[Score | None, str]:
    """Return the candidate that goes to the gate, and why or why none does.

    The best on the selection benchmark, if its score there is above the last observed checkpoint's less the margin; of
    equals the one that reaches least far.
    """
    observed = next(score for score in selection if score.model.role == "observed")
    candidates = [score for score in selection if score.model.role == "candidate"]
    if not candidates:
        return None, f"Every rung of the ladder is worse than the last observed step {observed.model.step}."
    best = max(candidates, key=lambda score: (score.accuracy, -score.model.step))
    numbers = (
        f"best candidate {best.model.title} scores {best.accuracy:.4f}, last observed step {observed.model.step}"
        f" {observed.accuracy:.4f}, on {best.n} problems of {best.benchmark}"
    )
    if best.accuracy <= observed.accuracy - margin:
        behind = "is ahead of" if margin == 0 else f"is within {margin:g} of"
        return None, f"No candidate {behind} the last observed checkpoint on the selection benchmark: {numbers}."
    return best, f"Chosen on the selection benchmark: {numbers}."
