"""A small Transformer on the leading coordinates of all tensors, the neural temporal model of arXiv 2605.21468.

Every coordinate is a series in the step, and its rates are taken in units of their own mean size. One causal
Transformer learns, from all series of the window, how the next rate departs from the series' mean rate, and is rolled
out to the target at the median spacing. Untrained it is the straight line through the first and the last
point. Everything is seeded; on one core 340 tensors x 75 checkpoints take a few minutes.
Shape suffixes: N = series (tensors x rank), K = checkpoints, S = positions, H = hidden width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from relex.errors import TargetError
from relex.predictors.predictor import Predictor, Window
from relex.streaming import single_threaded

_HIDDEN, _HEADS, _LAYERS, _FEEDFORWARD = 32, 4, 3, 64
_LEARNING_RATE = 3e-3
# Below this share of a tensor's largest singular value a direction is noise of the arithmetic.
_NULL = 1e-6


class _Rates(nn.Module):
    """From rates (N, S) to the next rate after each position (N, S)."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.enter = nn.Linear(1, _HIDDEN)
        self.position = nn.Parameter(0.02 * torch.randn(length, _HIDDEN))
        layer = nn.TransformerEncoderLayer(
            _HIDDEN, _HEADS, _FEEDFORWARD, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, _LAYERS, enable_nested_tensor=False)
        self.leave = nn.Linear(_HIDDEN, 1)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, rates_NS: Tensor, mean_N: Tensor) -> Tensor:
        length = rates_NS.shape[1]
        hidden_NSH = self.enter((rates_NS - mean_N[:, None])[..., None]) + self.position[:length]
        mask_SS = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
        departure_NS: Tensor = self.leave(self.layers(hidden_NSH, mask=mask_SS, is_causal=True))[..., 0]
        return mean_N[:, None] + departure_NS


@dataclass(frozen=True)
class Neural(Predictor):
    """`rank` coordinates a tensor, `epochs` full-batch steps of AdamW, `seed` of the initial weights."""

    rank: int = 1
    epochs: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1 or self.epochs < 0:
            raise TargetError(f"rank is {self.rank} and epochs {self.epochs}; give at least 1 and 0.")

    @property
    def by_tensor(self) -> bool:
        """One network learns from all tensors."""
        return False

    def coefficients(self, window: Window, target_step: float) -> Tensor:
        """Return the fp64 (T, K) coefficients of all tensors together; one Gram (K, K) alone is allowed."""
        steps_K = window.steps_K
        count = len(steps_K)
        if count < max(3, self.rank):
            raise TargetError(
                f"neural at rank {self.rank} needs at least {max(3, self.rank)} checkpoints, and the window has"
                f" {count}. Widen it, or choose another method."
            )
        values_TK, vectors_TKK = window.eigen
        sigma_TR = values_TK[..., -self.rank :].clamp(min=0.0).sqrt()
        basis_TKR = vectors_TKK[..., -self.rank :]
        series = (basis_TKR * sigma_TR[..., None, :]).movedim(-2, -1)
        predicted_TR = self._predict(series.reshape(-1, count), steps_K, target_step).reshape(sigma_TR.shape)
        kept_TR = sigma_TR > _NULL * sigma_TR[..., -1:]
        scaled_TR = torch.where(kept_TR, predicted_TR / sigma_TR, 0.0)
        return torch.matmul(basis_TKR, scaled_TR[..., None])[..., 0]

    def _predict(self, series_NK: Tensor, steps_K: Tensor, target_step: float) -> Tensor:
        """Return (N,) fp64 where each series is at the target."""
        gaps_K = steps_K.diff()
        rates_NS = series_NK.diff(dim=1) / gaps_K
        mean_N = (series_NK[:, -1] - series_NK[:, 0]) / (steps_K[-1] - steps_K[0])
        # In its own direction, so that the sign of an eigenvector, which is the library's choice, does not matter.
        unit_N = rates_NS.abs().mean(1) * torch.where(mean_N < 0, -1.0, 1.0)
        unit_N = torch.where(unit_N != 0, unit_N, 1.0)
        scaled_NS, scaled_N = rates_NS / unit_N[:, None], mean_N / unit_N
        with single_threaded(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = _Rates(scaled_NS.shape[1]).double()
            self._train(model, scaled_NS, scaled_N)
            distance = target_step - float(steps_K[-1])
            moved_N = self._roll_out(model, scaled_NS, scaled_N, float(gaps_K.median()), distance)
        return series_NK[:, -1] + unit_N * moved_N

    def _train(self, model: _Rates, rates_NS: Tensor, mean_N: Tensor) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(self.epochs, 1))
        for _ in range(self.epochs):
            optimizer.zero_grad()
            # A robust loss: the early rates of a run are its noisiest.
            loss = nn.functional.smooth_l1_loss(model(rates_NS[:, :-1], mean_N), rates_NS[:, 1:])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def _roll_out(self, model: _Rates, rates_NS: Tensor, mean_N: Tensor, gap: float, distance: float) -> Tensor:
        """Return (N,) fp64 how far each series goes, in units of its rate, over `distance` steps."""
        moved_N = torch.zeros(len(rates_NS), dtype=torch.float64)
        model.eval()
        while distance > 0:
            next_N = model(rates_NS, mean_N)[:, -1]
            moved_N += next_N * min(gap, distance)
            rates_NS = torch.cat([rates_NS[:, 1:], next_N[:, None]], dim=1)
            distance -= gap
        return moved_N
