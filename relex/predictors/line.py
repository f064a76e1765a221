"""The least-squares straight line in the training step, as weights on the observed values (METHODS: h and g)."""

from torch import Tensor


def slope(steps_K: Tensor) -> Tensor:
    """Return (K,) g with g @ values = the fitted line's slope per step; steps are distinct, of any spacing."""
    centred_K = steps_K - steps_K.mean()
    return centred_K / centred_K.square().sum()


def line_at(steps_K: Tensor, target_step: float) -> Tensor:
    """Return (K,) h with h @ values = the fitted line's value at `target_step`."""
    return 1.0 / len(steps_K) + (target_step - steps_K.mean()) * slope(steps_K)
