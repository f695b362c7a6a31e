"""AdamW with two options that optax's does not have: 8-bit moments, and StableAdamW's update clipping.

8-bit moments: arXiv 2110.02861 (block-wise dynamic quantisation), 1 byte per value and a float32 scale per 256 values.
StableAdamW: arXiv 2304.13013, the update is divided by the RMS of g / √v if that exceeds 1, as in optimi.

The weights are float32 (or bfloat16, rounded stochastically), so they need no Kahan compensation.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from anima_jax.training.optimizers.layers import transformation
from anima_jax.training.optimizers.row import Parameter, cautious, ema, from_rule

BLOCK = 256
"""Number of values that share a scale."""


class Blocks(NamedTuple):
    """An array in 8 bits: `codes` have its shape, `scales` one entry per block along its longest axis.

    int8 codes are signed; uint8 codes are for non-negative values.
    """

    codes: Array
    scales: Array


class AdamState(NamedTuple):
    """Number of finished steps, and running means of the gradients (`mu`) and of their squares (`nu`).

    In 8 bits, `nu` contains the square root, which spans fewer decades.
    """

    count: Array  # pyright: ignore[reportIncompatibleMethodOverride] - optax's name
    mu: Any
    nu: Any


def _levels(codes: Array, dtype: Any) -> Array:
    """Return the value in [0, 1] of a code's magnitude q: 0 if q = 0, else 10^(e − E) · (0.9·(q + 1) / 2^e − 0.8).

    e is the position of the highest bit of q, E that of the largest code: decade e, counted from the smallest, has 2^e
    equal steps. So the largest value of a block is exact, and small values keep some digits.
    """
    top = 7 if dtype == jnp.uint8 else 6
    q = jnp.maximum(codes, 1)
    decade = 31 - jax.lax.clz(q)
    size = jnp.left_shift(1, decade).astype(jnp.float32)
    level = jnp.power(10.0, (decade - top).astype(jnp.float32)) * (0.9 * (q + 1).astype(jnp.float32) / size - 0.8)
    return jnp.where(codes == 0, 0.0, level)


def _positions(level: Array, dtype: Any) -> Array:
    """Return the inverse of `_levels`, linear between codes: a level between those of q and q + 1 is in [q, q + 1]."""
    top = 7 if dtype == jnp.uint8 else 6
    smallest = 10.0**-top
    decade = jnp.clip(jnp.ceil(jnp.log10(jnp.maximum(level, smallest))) + top, 0, top)
    above = jnp.exp2(decade) * (level * jnp.power(10.0, top - decade) + 0.8) / 0.9 - 1.0
    return jnp.where(level < smallest, level / smallest, above)


def _longest_axis(shape: tuple[int, ...]) -> int:
    return max(range(len(shape)), key=shape.__getitem__)


def encode(values: Array, key: Array, dtype: Any = jnp.int8) -> Blocks:
    """Return `values` (float32, non-negative for uint8) in 8 bits, stochastically rounded so that the mean is kept.

    Rounding to nearest would lose every change of a moment smaller than half a step: nearly all of them at β2 = 0.999.
    A positive uint8 value never becomes 0, because the update would then be divided by eps alone.
    """
    axis = _longest_axis(values.shape)
    rows = jnp.moveaxis(values, axis, -1)
    length = rows.shape[-1]
    pad = [(0, 0)] * (rows.ndim - 1) + [(0, -length % BLOCK)]
    blocks = jnp.pad(rows, pad).reshape(*rows.shape[:-1], -1, BLOCK)
    scales = jnp.max(jnp.abs(blocks), axis=-1)
    level = jnp.abs(blocks) / jnp.where(scales > 0, scales, 1.0)[..., None]
    largest = jnp.iinfo(dtype).max
    codes = jnp.floor(_positions(level, dtype) + jax.random.uniform(key, level.shape)).astype(jnp.int32)
    codes = jnp.clip(codes, (level > 0) if dtype == jnp.uint8 else 0, largest) * jnp.where(blocks < 0, -1, 1)
    codes = codes.reshape(*rows.shape[:-1], -1)[..., :length].astype(dtype)
    return Blocks(jnp.moveaxis(codes, -1, axis), jnp.moveaxis(scales, -1, axis))


def decode(stored: Blocks) -> Array:
    """Return the decoded values in float32."""
    codes, scales = stored
    axis = _longest_axis(codes.shape)
    wide = codes.astype(jnp.int32)
    levels = _levels(jnp.abs(wide), codes.dtype) * jnp.sign(wide)
    return levels * jax.lax.slice_in_dim(jnp.repeat(scales, BLOCK, axis=axis), 0, codes.shape[axis], axis=axis)


def adamw(
    rate: optax.ScalarOrSchedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float,
    stabilize: bool = False,
    in_8_bits: bool = False,
    seed: int = 0,
) -> optax.GradientTransformation:
    """Return AdamW for one tensor. `stabilize` depends on its norm, so stacked tensors need `layers.over_layers`.

    Moments in 8 bits are rounded with random numbers that follow from `seed` and the step.
    """

    def init(value: Array) -> AdamState:
        zeros = jnp.zeros(value.shape, jnp.float32)
        if not in_8_bits:
            return AdamState(jnp.zeros((), jnp.int32), zeros, zeros)
        key = jax.random.key(seed)
        return AdamState(jnp.zeros((), jnp.int32), encode(zeros, key), encode(zeros, key, jnp.uint8))

    def update(grad: Array, state: AdamState, value: Array) -> tuple[Array, AdamState]:
        count = state.count + 1
        mu, nu = (decode(state.mu), jnp.square(decode(state.nu))) if in_8_bits else (state.mu, state.nu)
        mu, nu = b1 * mu + (1.0 - b1) * grad, b2 * nu + (1.0 - b2) * jnp.square(grad)
        nu_hat = nu / (1.0 - b2**count)
        direction = mu / (1.0 - b1**count) / (jnp.sqrt(nu_hat) + eps) + weight_decay * value
        if stabilize:
            rms = jnp.sqrt(jnp.mean(jnp.square(grad) / jnp.maximum(nu_hat, eps**2)))
            direction = direction / jnp.maximum(1.0, rms)
        if in_8_bits:
            keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), count))
            mu, nu = encode(mu, keys[0]), encode(jnp.sqrt(nu), keys[1], jnp.uint8)
        return direction, AdamState(count, mu, nu)

    return optax.chain(transformation(init, update), optax.scale_by_learning_rate(rate))


def lion(
    p: Parameter, *, b1: float, b2: float, min_8bit_size: float = math.inf, use_cautious: bool = False
) -> optax.GradientTransformation:
    """Return Lion (arXiv 2302.06675), with its momentum in 8 bits from `min_8bit_size` values on."""
    in_8_bits = math.prod(p.tensor.shape) >= min_8bit_size

    def init(value: Array) -> Any:
        zeros = jnp.zeros(value.shape, jnp.float32)
        return encode(zeros, jax.random.key(p.seed)) if in_8_bits else zeros

    def step(grad: Array, own: Any, value: Array, t: Array, rate: Array) -> tuple[Array, Any]:
        mean = decode(own) if in_8_bits else own
        update, mean = jnp.sign(ema(mean, grad, b1)), ema(mean, grad, b2)
        if use_cautious:
            update = cautious(update, grad)
        key = jax.random.fold_in(jax.random.key(p.seed), t.astype(jnp.int32))
        return -rate * update, encode(mean, key) if in_8_bits else mean

    return from_rule(p, init, step)
