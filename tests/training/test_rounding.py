"""Stochastic rounding, compared with the bfloat16 neighbours of a value and its mean."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from anima_jax.training.rounding import stochastic_round


def test_results_are_neighbours_whose_mean_is_the_value():
    rng = np.random.default_rng(0)
    values = (rng.normal(size=64) * 10.0 ** rng.integers(-30, 30, 64)).astype(np.float32)
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    rounded = np.asarray(jax.vmap(lambda key: stochastic_round(jnp.asarray(values), key))(keys)).astype(np.float64)

    nearest = values.astype(ml_dtypes.bfloat16)
    error = values.astype(np.float64) - nearest.astype(np.float64)
    direction = np.where(error > 0, np.inf, -np.inf).astype(ml_dtypes.bfloat16)
    other = np.nextafter(nearest, direction).astype(np.float64)
    nearest = nearest.astype(np.float64)
    step = np.abs(other - nearest)
    assert np.all((rounded == nearest) | (rounded == other))
    # A draw's standard deviation is at most half a step. Five of the mean's: one false alarm in 30,000 runs.
    assert np.all(np.abs(rounded.mean(0) - values) <= 5 * 0.5 * step / np.sqrt(draws))


def test_small_updates_accumulate():
    """1000 updates of 1e-4 to 1: rounded to nearest, bfloat16 (step 1/128) would stay at 1."""

    def add(weights, key):
        return stochastic_round(weights.astype(jnp.float32) + 1e-4, key), None

    start = jnp.ones(4096, jnp.bfloat16)
    end, _ = jax.lax.scan(add, start, jax.random.split(jax.random.key(0), 1000))
    # Variance of a weight: 1000 · step · 1e-4, so the mean of 4096 has a standard deviation of 4.4e-4.
    np.testing.assert_allclose(np.asarray(end, np.float64).mean(), 1.1, atol=5 * 4.4e-4)


def test_bfloat16_values_are_unchanged():
    bits = np.arange(2**16, dtype=np.uint16)  # every bfloat16 there is
    values = bits.view(ml_dtypes.bfloat16)
    rounded = np.asarray(stochastic_round(jnp.asarray(values.astype(np.float32)), jax.random.key(0)))
    assert rounded.dtype == ml_dtypes.bfloat16
    finite = ~np.isnan(values.astype(np.float32))
    np.testing.assert_array_equal(rounded.view(np.uint16)[finite], bits[finite])
    assert np.all(np.isnan(rounded.astype(np.float32)[~finite]))


def test_infinities_and_nan_are_kept_and_finite_values_do_not_overflow():
    hidden = np.array([0x7F800001, 0xFF800001], np.uint32).view(np.float32)  # NaN only in the bits that are cut off
    values = np.array([np.inf, -np.inf, np.nan, *hidden], np.float32)
    rounded = np.asarray(stochastic_round(jnp.asarray(values), jax.random.key(0))).astype(np.float32)
    np.testing.assert_array_equal(rounded, [np.inf, -np.inf, np.nan, np.nan, np.nan])

    largest = np.full(1000, np.finfo(np.float32).max)
    rounded = np.asarray(stochastic_round(jnp.asarray(largest), jax.random.key(0)))
    assert np.all(rounded == ml_dtypes.finfo(ml_dtypes.bfloat16).max)
