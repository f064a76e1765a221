"""What was decided about one window, with every number that decided it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from evaluation.verdict.gate import Gate


@dataclass(frozen=True)
class Model:
    """A model that was scored: the base, the last observed checkpoint, the best one, a candidate, or the champion.

    `step` is the training step it stands for; `digest` and `method` are empty for the base and the observed one.
    `skill_at_least` is what the backtest said of a candidate's weights against holding the last observed ones (1:
    exact, 0: no better; one-sided 95 %), None where its horizon was not trusted.
    """

    role: Literal["base", "observed", "best", "candidate", "champion"]
    step: int
    directory: str
    method: str = ""
    digest: str = ""
    skill_at_least: float | None = None

    @property
    def title(self) -> str:
        """What a table calls it."""
        names = {"base": "base", "observed": "last observed", "best": "best observed", "champion": "champion"}
        return f"{names.get(self.role, self.method)} @ {self.step}"


@dataclass(frozen=True)
class Score:
    """One model on one benchmark: mean score, its standard error and its 95 % interval, all in 0..1.

    It cost `answers`, which took `seconds` in the model; 0 where an earlier version did not say.
    """

    model: Model
    benchmark: str
    accuracy: float
    standard_error: float
    n: int
    low: float = 0.0
    high: float = 1.0
    answers: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Rung:
    """One rung of a ladder: a method at a target step, and its accuracy on the first `n` selection problems.

    `worse` is than the best of its direction below it, the last observed checkpoint among them, by more than two
    standard errors.
    """

    method: str
    step: int
    accuracy: float
    n: int
    worse: bool


@dataclass(frozen=True)
class Backtested:
    """What the backtest said of the window, see relex.backtest.convergence.

    `looks` are the last steps it was repeated at, `trusted_step` the furthest target it trusts, None where it trusts
    none. Skill is of the weights against holding the last observed ones, with its one-sided 95 % bound.
    """

    state: Literal["trusted", "unsettled", "hidden", "hold"]
    looks: tuple[int, ...]
    method: str
    horizon: float | None
    skill: float | None
    skill_at_least: float | None
    trusted_step: int | None
    reason: str


@dataclass(frozen=True)
class Divergence:
    """How far candidate and last observed checkpoint are from the base on `tokens` tokens of so many gate prompts.

    KL(model ‖ base) of the next token, in nats a token, see evaluation.answers.divergence.
    """

    benchmark: str
    prompts: int
    tokens: int
    candidate: float
    observed: float

    @property
    def sentence(self) -> str:
        """Both numbers in plain words; they decide nothing."""
        more = f", {self.candidate / self.observed:.2g} times as far" if self.observed > 0 else ""
        return (
            f"On the tokens of {self.prompts} prompts of {self.benchmark}, which nobody was rewarded for, the candidate"
            f" is {self.candidate:.2g} nats a token from the base and the last observed checkpoint"
            f" {self.observed:.2g}{more}."
        )


@dataclass(frozen=True)
class Decision:
    """The verdict on one window. `winner` is the candidate that went to the gate, None when none did.

    One that passed the gate is `registered`, `refused` where a guard shows that it loses more than it may, or `not
    shown` where a guard shows neither; without that it is `keep training`. `guards` has the last observed checkpoint as
    their reference, and is empty where the gate was not passed.

    `selection` has the last observed checkpoint and the candidates that were scored on all selection problems,
    `dropped` those that were given up on fewer, `ladder` how automatic targets were climbed. `attempt` of `attempts`
    windows of this run went to the gate. `written` is when each of `steps` was written, as the ledger has it (ns since
    the epoch).
    """

    training_run: str
    key: str
    window: int
    steps: tuple[int, ...]
    verdict: Literal["registered", "refused", "not shown", "keep training"]
    reason: str
    backtested: Backtested | None = None
    attempt: int = 1
    attempts: int = 1
    written: tuple[int, ...] = ()
    selection: tuple[Score, ...] = ()
    dropped: tuple[Score, ...] = ()
    ladder: tuple[Rung, ...] = ()
    report: tuple[Score, ...] = ()
    gates: tuple[Gate, ...] = ()
    guards: tuple[Gate, ...] = ()
    divergence: Divergence | None = None
    warnings: tuple[str, ...] = ()
    winner: Model | None = None
    stop: str = ""
    registered: str = ""
    registered_url: str = ""
    record_url: str = ""
    page_url: str = ""

    @property
    def trusted_step(self) -> int | None:
        """The furthest target step that the backtest trusts, None where it trusts none."""
        return self.backtested.trusted_step if self.backtested is not None else None

    @property
    def cost(self) -> tuple[int, float]:
        """What choosing cost: selection answers, each counted once, and seconds in the models."""
        scores = (*self.selection, *self.dropped)
        return sum(score.answers for score in scores), sum(score.seconds for score in scores)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Decision":
        """Read back what to_json wrote."""
        return TypeAdapter(cls).validate_python(content)


def guard_verdict(guards: Sequence[Gate]) -> Literal["registered", "refused", "not shown"]:
    """Return what the guards make of a candidate that passed the gate."""
    if any(guard.verdict == "worse" for guard in guards):
        return "refused"
    return "registered" if all(guard.passed for guard in guards) else "not shown"


def guard_metrics(guards: Sequence[Gate]) -> dict[str, float]:
    """Return the numbers of guards by benchmark, for MLflow."""
    return {
        f"guard/{guard.benchmark}/{name}": value
        for guard in guards
        for name, value in (
            ("accuracy", guard.candidate_accuracy),
            ("difference", guard.difference),
            ("lower_bound", guard.lower_bound),
        )
    }


def divergence_metrics(divergence: Divergence | None) -> dict[str, float]:
    """Return nats a token of both models, for MLflow; nothing where they were not measured."""
    if divergence is None:
        return {}
    return {"divergence_candidate": divergence.candidate, "divergence_observed": divergence.observed}


def gate_metrics(gates: Sequence[Gate]) -> dict[str, float]:
    """Return the numbers of a gate by name, for MLflow."""
    numbers: dict[str, float] = {}
    for gate in gates:
        role = gate.reference.split(" @ ", maxsplit=1)[0].replace(" ", "_")
        numbers |= {
            "gate_accuracy": gate.candidate_accuracy,
            f"gate_{role}_accuracy": gate.reference_accuracy,
            f"gate_{role}_difference": gate.difference,
            f"gate_{role}_lower_bound": gate.lower_bound,
        }
    return numbers
