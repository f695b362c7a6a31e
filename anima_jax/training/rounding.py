"""Stochastic rounding to bfloat16: up or down at random, so that the expected result is the value itself.

Rounding to nearest would lose every update smaller than half a step of bfloat16 (2^-9 of a weight).
"""

import jax
import jax.numpy as jnp
from jax import Array


def stochastic_round(values: Array, key: Array) -> Array:
    """Return float32 `values` as bfloat16; the probability of rounding away from 0 is the fraction of a step cut off.

    Values that bfloat16 can represent, infinities and NaN are unchanged; no finite value becomes infinite.
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)

    def upper_half(bits: Array) -> Array:
        return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)

    rounded, cut = upper_half(bits + noise), upper_half(bits)
    return jnp.where(jnp.isfinite(values), jnp.where(jnp.isfinite(rounded), rounded, cut), values.astype(jnp.bfloat16))
