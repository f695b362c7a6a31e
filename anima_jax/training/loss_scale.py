"""Dynamic loss scaling: with float16 the loss is multiplied by a factor, so that small gradients do not become zero.

The mean loss of 4,096 tokens has gradients of about 1e-6 in the activations, below float16's smallest normal number,
6e-5, and in attention below its smallest of all, 6e-8. Initial value, growth and backoff are those of PyTorch's
`torch.amp.GradScaler`.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

INITIAL = 2.0**16
GROWTH_INTERVAL = 2000
"""Applied updates in a row after which the scale is doubled."""

SMALLEST, LARGEST = 1.0, 2.0**24
"""Limits of the scale. PyTorch has none; beyond these a scale helps nothing."""


class LossScale(NamedTuple):
    """The factor of the loss, a power of two, and the number of updates in a row that were applied with it."""

    scale: Array
    applied: Array


def initial(compute_dtype: Any) -> LossScale | None:
    """Return the loss scale before the first step, on the host; None if `compute_dtype` needs none."""
    if jnp.dtype(compute_dtype) != jnp.float16:
        return None
    return LossScale(np.float32(INITIAL), np.int32(0))  # pyright: ignore[reportArgumentType] - placed by the caller


def adjusted(old: LossScale, loss: Array, finite: Array) -> LossScale:
    """Return the scale after a step: halved if the gradient overflowed, doubled after `GROWTH_INTERVAL` updates.

    A `loss` that is itself not finite is not the fault of the scale, which then stays.
    """
    grows = old.applied + 1 >= GROWTH_INTERVAL
    factor = jnp.where(finite, jnp.where(grows, 2.0, 1.0), jnp.where(jnp.isfinite(loss), 0.5, 1.0))
    applied = jnp.where(finite & ~grows, old.applied + 1, 0)
    return LossScale(jnp.clip(old.scale * factor, SMALLEST, LARGEST), applied)


def overflowed(old: LossScale | None, loss: Array, finite: Array) -> Array:
    """Return whether an update was skipped only because the scale, which can still become smaller, was too large."""
    if old is None:
        return jnp.zeros((), bool)
    return ~finite & jnp.isfinite(loss) & (old.scale > SMALLEST)
