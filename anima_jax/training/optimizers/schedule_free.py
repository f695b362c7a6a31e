"""Schedule-free optimizers (arXiv 2405.15682) as in pytorch_optimizer and schedulefree: AdamW, RAdam and SGD.

The weights are y = (1 − β)·z + β·x: the gradient is taken there, z makes the steps, and x, the average of z, is the
result.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.errors import UserError
from anima_jax.training.optimizers.layers import transformation
from anima_jax.training.optimizers.row import Parameter, Row, debias, ema


class FreeState(NamedTuple):
    """Finished steps, β, z, the sum of the steps' weights, the largest rate so far, and Adam's second moments."""

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] - optax's name
    b1: Array
    z: Array
    weights: Array
    highest: Array
    square: Array | None
    largest: Array | None

    def average(self, y: Array) -> Array:
        """Return x in float32."""
        return (y.astype(jnp.float32) - (1.0 - self.b1) * self.z) / self.b1


def averaged_steps(beta: float, t: Array) -> Array:
    """Return RAdam's ρ at step t (arXiv 1908.03265): 2 / (1 − β) − 1 − 2·t·βᵗ / (1 − βᵗ), the first steps about t.

    With u = −log β and x = t·u it is a constant + t − 2/u·(x / (eˣ − 1) − 1 + x / 2), without cancellation.
    """
    u = -math.log(beta)
    x = t * u
    series = jnp.square(x) / 12.0 * (1.0 - jnp.square(x) / 60.0 + x**4 / 2520.0)
    rest = jnp.where(x < 0.5, series, x / jnp.expm1(x) - 1.0 + x / 2.0)
    return (2.0 / (1.0 - beta) - 1.0 - 2.0 / u) + t - 2.0 / u * rest


def rectified(beta: float, t: Array) -> tuple[Array, Array]:
    """Return RAdam's factor of the rate and whether it uses the second moment at step t: where ρ is above 4."""
    longest, length = 2.0 / (1.0 - beta) - 1.0, averaged_steps(beta, t)
    safe = jnp.maximum(length, 4.0 + 1e-3)
    ratio = (safe - 4.0) * (safe - 2.0) * longest / ((longest - 4.0) * (longest - 2.0) * safe)
    return jnp.sqrt(ratio), length > 4.0


def _free(
    p: Parameter,
    *,
    b1: float,
    r: float,
    weight_lr_power: float,
    b2: float | None = None,
    eps: float = 0.0,
    warmup_steps: int = 0,
    decoupling_c: int = 0,
    ams_bound: bool = False,
    rectify: bool = False,
    silent_sgd_phase: bool = True,
) -> optax.GradientTransformation:
    """Return the optimizer of one tensor: SGD without `b2`, RAdam with `rectify`, else AdamW."""
    if not b1:
        raise UserError("[optimizer] schedule-free averaging needs a first beta above 0")

    def init(value: Array) -> FreeState:
        zero, moment = jnp.zeros(()), None if b2 is None else jnp.zeros_like(value)
        largest = jnp.zeros_like(value) if ams_bound else None
        return FreeState(jnp.zeros((), jnp.int32), jnp.full((), b1), value, zero, zero, moment, largest)

    def update(grad: Array, state: FreeState, y: Array) -> tuple[Array, FreeState]:
        t = (state.count + 1).astype(jnp.float32)
        rate = p.rate_at(state.count)
        rate = rate * jnp.minimum(t / max(warmup_steps, 1), 1.0)
        square, largest = state.square, state.largest
        if square is not None and b2 is not None:
            square = ema(square, jnp.square(grad), b2)
            unbiased = square / debias(b2, t)
            if largest is not None:
                unbiased = largest = jnp.maximum(largest, unbiased)
            scaled = grad / (jnp.sqrt(unbiased) + eps)
            if rectify:
                factor, reliable = rectified(b2, t)
                rate = rate * jnp.where(reliable, factor, 0.0 if silent_sgd_phase else 1.0)
                scaled = jnp.where(reliable, scaled, grad)
            grad = scaled
        grad = grad + p.weight_decay * y
        highest = jnp.maximum(state.highest, rate)
        weight = t**r * highest**weight_lr_power
        weights = state.weights + weight
        share = jnp.where(weights > 0, weight / jnp.where(weights > 0, weights, 1.0), 0.0)
        if decoupling_c:
            share = jnp.minimum(1.0, share * (1.0 - b1) * decoupling_c)
        change = share * (state.z - y) + rate * (b1 * (1.0 - share) - 1.0) * grad
        new = FreeState(state.count + 1, state.b1, state.z - rate * grad, weights, highest, square, largest)
        return change, new

    return transformation(init, update)


def _row(name: str, options: dict[str, Any], fixed: dict[str, Any]) -> Row:
    def make(p: Parameter, **given: Any) -> optax.GradientTransformation:
        return _free(p, **given, **fixed)

    options = options | {"r": 0.0, "weight_lr_power": 2.0}
    return Row(name, make, options, aliases={"momentum": "b1"}, elementwise=True, averages_weights=True)


_ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}

ROWS = (
    _row("schedule_free_adamw", _ADAM | {"warmup_steps": 0, "decoupling_c": 0, "ams_bound": False}, {}),
    _row("schedule_free_radam", _ADAM | {"silent_sgd_phase": True}, {"rectify": True}),
    _row("schedule_free_sgd", {"b1": 0.9, "warmup_steps": 0}, {}),
)
