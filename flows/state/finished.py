"""Finished run: what each rule of stopping would have done about it, and what it would have cost; a small file each.

The files lie in `record` of the state directory, so that all runs watched from one place are one record. They are what
a rule earns its vote by (conformal risk control, Angelopoulos et al., arXiv 2208.02814): a rule stops where the points
that it says training on may win are at most λ, and λ is the largest with (Σ_i L_i(λ) + 1) / (n + 1) <= RISK, L_i = 1
where run i would have been stopped, at its first such look, and lost more than the price. If the next run is one more
of the same kind, a costly stop by that rule has at most the probability RISK, whatever the rule is. No λ is known of
fewer than 1 / RISK - 1 runs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flows.settings import Settings
from flows.state.records import read_json, write_json

# The probability of a stop that costs more than its price.
RISK = 0.1


@dataclass(frozen=True)
class Finished:
    """One look at a run that has come to its planned `end`: a winner registered after step `window`.

    `winner` and `real` are accuracies of that winner and of the real checkpoint at the end, on `n` problems of
    `benchmark`. `rules` has the points that each rule said training on may win.
    """

    training_run: str
    key: str
    window: int
    end: int
    benchmark: str
    n: int
    winner: float
    real: float
    rules: dict[str, float]

    @property
    def cost(self) -> float:
        """What stopping at this look would have cost, in points."""
        return 100 * (self.real - self.winner)


@dataclass(frozen=True)
class _Run:
    looks: tuple[Finished, ...]


def keep_finished(settings: Settings, looks: Sequence[Finished]) -> None:
    """Write the looks at this training run in the place of what was known of it."""
    ordered = sorted(looks, key=lambda look: look.window)
    write_json(settings.state / "record" / f"{settings.training_run}.json", asdict(_Run(tuple(ordered))))


def read_finished(state: Path) -> list[tuple[Finished, ...]]:
    """Return the finished runs below a state directory, by name; each with its looks, the earliest first."""
    return [read_json(path, _Run).looks for path in sorted((state / "record").glob("*.json"))]


def vote(runs: Sequence[Sequence[Finished]], rule: str, *, price: float) -> float | None:
    """Return the largest λ that the record allows a rule, None where it allows none or has too few runs.

    Of runs that the rule said nothing of nothing is known. No λ goes beyond what was seen.
    """
    known = [looks for looks in runs if any(rule in look.rules for look in looks)]
    allowed = None
    lost: set[int] = set()
    for strictness in sorted({look.rules[rule] for looks in known for look in looks if rule in look.rules}):
        for number, looks in enumerate(known):
            first = next((look for look in looks if look.rules.get(rule, float("inf")) <= strictness), None)
            # Who lost at a smaller λ counts as lost at a larger one: else more stops could look like less risk.
            if first is not None and first.cost > price:
                lost.add(number)
        if (len(lost) + 1) / (len(known) + 1) > RISK + 1e-12:
            break
        allowed = strictness
    return allowed
