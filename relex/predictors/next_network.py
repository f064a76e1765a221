"""The network of NExt (arXiv 2604.11446): from a global and a local vector to what comes next.

Two encoders and a decoder, each four linear layers that pass through 256 units twice. Mean L1, AdamW, full batch, the
learning rate falling along a cosine to a tenth. Seeded and on one thread: equal input gives equal bits.
Shape suffixes: P = samples, S = what is predicted from, D = length of the vectors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from relex.streaming import single_threaded

_HIDDEN = 256
_LEARNING_RATE = 2e-5
# The gradient of the whole batch is summed over rows of this many: it bounds the memory, and stays near the core.
_ROWS = 256


def _layers(entering: int, leaving: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(entering, _HIDDEN),
        nn.Linear(_HIDDEN, entering),
        nn.ReLU(),
        nn.Linear(entering, _HIDDEN),
        nn.Linear(_HIDDEN, leaving),
    )


class Network(nn.Module):
    """From (P, D) and (P, D) to (P, D)."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.of_global = _layers(length, length)
        self.of_local = _layers(length, length)
        self.decode = _layers(2 * length, length)

    def forward(self, global_PD: Tensor, local_PD: Tensor) -> Tensor:
        """Return what comes next."""
        both = torch.cat([self.of_global(global_PD), self.of_local(local_PD)], dim=1)
        decoded: Tensor = self.decode(both)
        return decoded


def memory(length: int) -> int:
    """Return the bytes that `learn` takes for vectors of this length, beside them."""
    parameters = 15 * _HIDDEN * length + 7 * length + 6 * _HIDDEN
    return 4 * (4 * parameters + _ROWS * (40 * length + 12 * _HIDDEN))


def learn(
    global_PD: Tensor,
    local_PD: Tensor,
    target_PD: Tensor,
    latest_global_SD: Tensor,
    latest_local_SD: Tensor,
    *,
    epochs: int,
    seed: int,
    on_epoch: Callable[[int], None] | None = None,
) -> Tensor:
    """Train on the samples and return (S, D) fp32 what the network makes of the latest ones.

    `on_epoch` is called with how many epochs are done.
    """
    with single_threaded(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Network(target_PD.shape[1])
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1), eta_min=_LEARNING_RATE / 10)
        batches = list(zip(*(torch.split(whole, _ROWS) for whole in (global_PD, local_PD, target_PD)), strict=True))
        for epoch in range(epochs):
            optimizer.zero_grad()
            for observed, local, target in batches:
                loss = (model(observed, local) - target).abs().sum() / target_PD.numel()
                torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            if on_epoch is not None:
                on_epoch(epoch + 1)
        with torch.no_grad():
            rows = zip(torch.split(latest_global_SD, _ROWS), torch.split(latest_local_SD, _ROWS), strict=True)
            return torch.cat([model(observed, local) for observed, local in rows])
