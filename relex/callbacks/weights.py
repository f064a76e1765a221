"""The trainable weights of a model in training: copies on the CPU, and the line through two of them.

Under FSDP every process handles its own shards, element by element: no weight is gathered.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

Copies = dict[str, Tensor]


def copies(model: torch.nn.Module) -> Copies:
    """Return a copy on the CPU of each trainable weight (of this process's part of it), by name."""
    return {name: local.to("cpu", copy=True) for name, local in _locals(model)}


def fits(kept: Copies, model: torch.nn.Module) -> bool:
    """Return whether the copies are of this model's trainable weights, by name, shape and dtype."""
    shapes = {name: (local.shape, local.dtype) for name, local in _locals(model)}
    return shapes == {name: (tensor.shape, tensor.dtype) for name, tensor in kept.items()}


@torch.no_grad()
def place(model: torch.nn.Module, now: Copies, before: Copies, *, share: float) -> bool:
    """Make the weights now + share (now - before), and return whether all are finite.

    With a share of 0 they are `now`, bit for bit. Computed in fp32 and rounded once.
    """
    finite = True
    for name, local in _locals(model):
        latest = now[name].to(local.device)
        if share:
            line = latest.float()
            line = line + share * (line - before[name].to(local.device).float())
            latest = line.to(local.dtype)
            finite = finite and bool(torch.isfinite(latest).all())
        local.copy_(latest)
    return finite


def sharded(model: torch.nn.Module) -> bool:
    """Return whether a process holds a part of the weights only."""
    # Between a forward pass and the next step FSDP's root has whole weights.
    return any(isinstance(module, FSDPModule) for module in model.modules()) or any(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def _locals(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield what this process stores of each trainable weight, writable."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # What was gathered for a forward pass is a copy, which the next one would use in place of what is written.
            module.reshard()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            data = parameter.detach()
            yield name, data.to_local() if isinstance(data, DTensor) else data
