"""Random numbers for training: each is a pure function of (seed, epoch, example id, purpose).

A run therefore draws the same noise, times and dropout on any number of devices and with any micro-batch size. Noise is
drawn in token order, (l, features), so a token's noise does not depend on how much padding follows.
Axes: b batch, l tokens.
"""

import enum
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


class Purpose(enum.IntEnum):
    """What a random number is for. New purposes get new values; old ones never change, or resumed runs would differ."""

    TIME = 0
    NOISE = 1
    CAPTION_DROPOUT = 2
    EVALUATION_NOISE = 3
    ADAPTER_DROPOUT = 4


def split_ids(ids: np.ndarray) -> np.ndarray:
    """Split 64-bit example ids (b,) into two uint32 each, (b, 2), high half first: JAX's integers have 32 bits."""
    ids = np.asarray(ids, np.uint64)
    return np.stack([ids >> np.uint64(32), ids & np.uint64(0xFFFFFFFF)], axis=-1).astype(np.uint32)


def example_keys(seed: Array | int, epochs_b: Array, ids_b2: Array, purpose: Purpose) -> Array:
    """Return one key per example, (b,)."""
    base = jax.random.key(seed)

    def one(epoch: Array, id_2: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(base, epoch), id_2[0])
        return jax.random.fold_in(jax.random.fold_in(key, id_2[1]), purpose)

    return jax.vmap(one)(epochs_b, ids_b2)


def normal(keys_b: Array, shape: tuple[int, ...]) -> Array:
    """Return standard normal numbers (b, *shape), float32."""
    return jax.vmap(functools.partial(jax.random.normal, shape=shape, dtype=jnp.float32))(keys_b)


def uniform(keys_b: Array) -> Array:
    """Return uniform numbers in [0, 1), (b,), float32."""
    return jax.vmap(functools.partial(jax.random.uniform, dtype=jnp.float32))(keys_b)
