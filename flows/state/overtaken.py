"""A registered version next to a real checkpoint, problem by problem, and whether the run has overtaken it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Paired:
    """A prediction and the real checkpoint on one benchmark, problem by problem.

    `difference` is predicted minus real accuracy, with the ends of its 95 % interval.
    """

    benchmark: str
    n: int
    predicted: float
    real: float
    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Against:
    """The real checkpoint of training step `step` against a registered version, which was predicted as `title`."""

    registered: str
    title: str
    step: int
    pair: Paired

    @property
    def beaten(self) -> bool:
        """Whether the real checkpoint is better, at 95 %."""
        return self.pair.high < 0

    @property
    def short(self) -> str:
        """Return it as a tag says it."""
        return f"real step {self.step} by {-100 * self.pair.difference:.1f} points on {self.pair.benchmark}"

    @property
    def sentence(self) -> str:
        """Return it in plain words."""
        pair = self.pair
        return (
            f"Real step {self.step} scores {-100 * pair.difference:.1f} points more than {self.registered}"
            f" ({self.title}): {pair.real:.4f} and {pair.predicted:.4f} on {pair.n} problems of {pair.benchmark},"
            f" {-100 * pair.high:.1f} to {-100 * pair.low:.1f} points with 95 % confidence."
        )
