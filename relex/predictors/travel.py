"""The late secant, damped by how far the run travels: J = T (1 - exp(-(target - s_K) / T)) with T = 1.5e-3 / lr.

The direction of a run under Adam turns with what it travels, learning rate times steps, more than with its steps. The
constant was measured on two tasks of the demo and did not hold on a third: a place to start from, not a law.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from relex.errors import TargetError
from relex.learning_rate import learning_rate
from relex.predictors.predictor import Predictor, Window
from relex.predictors.secant import LateSecant, along
from relex.trajectory import Trajectory

# Learning rate times steps in which the jump loses all but 1/e of its pace.
E_FOLDING = 1.5e-3


@dataclass(frozen=True)
class Travel(Predictor):
    """The line of LateSecant; `lr` is the learning rate, None before it is `informed`, and `told_by` who said so."""

    share: float = 0.5
    lr: float | None = None
    told_by: str = "the method's lr"

    def __post_init__(self) -> None:
        LateSecant(self.share)
        if self.lr is not None and self.lr <= 0:
            raise TargetError(f"lr is {self.lr:g}; give a learning rate above 0, or leave it out to have it read.")

    @property
    def by_tensor(self) -> bool:
        """Once the learning rate is known."""
        return self.lr is not None

    def informed(self, trajectory: Trajectory, *, memory: int, threads: int) -> "Travel":
        """Return it with the learning rate: the trainer's own word, or what the weights tell. Raises TargetError."""
        if self.lr is not None:
            return self
        rate = learning_rate(trajectory, memory=memory, threads=threads)
        return replace(self, lr=rate.value, told_by=rate.told_by)

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients, zero but for the two checkpoints; the Gram is not looked at."""
        if self.lr is None:
            raise TargetError("travel needs the learning rate, which a Gram does not tell: write travel:lr=….")
        length = E_FOLDING / self.lr
        steps = torch.tensor((target_step - float(window.steps_K[-1])) / length, dtype=torch.float64)
        return along(window, self.share, length * float(-torch.expm1(-steps)))
