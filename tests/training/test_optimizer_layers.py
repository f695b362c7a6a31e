"""Optimizers on stacked layers, compared with a loop over the layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from anima_jax.training.optimizers import adam
from anima_jax.training.optimizers.layers import in_float32, over_layers

TRANSFORMS = {
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "novograd": lambda: optax.novograd(1e-2),
    "galore": lambda: optax.contrib.galore(1e-2, rank=3, update_proj_gap=2),
    "adamw8bitkahan": lambda: adam.adamw(
        lambda step: 1e-2 / (1 + step), b1=0.9, b2=0.99, eps=1e-6, weight_decay=0.1, stabilize=True, in_8_bits=True
    ),
}


@pytest.mark.parametrize("in_turn", [1, 10**9], ids=["in turn", "together"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_stacked_layers_train_like_separate_tensors(name, in_turn):
    transform = TRANSFORMS[name]()
    stacked = over_layers(transform, in_turn)
    rng = np.random.default_rng(0)
    start = rng.normal(size=(3, 8, 12)).astype(np.float32)
    gradients = rng.normal(size=(4, 3, 8, 12)).astype(np.float32)

    def run(tx, value, grads):
        update, state = jax.jit(tx.update), tx.init(value)
        for grad in grads:
            step, state = update(jnp.asarray(grad), state, value)
            value = value + step
        return np.asarray(value), state

    ours, state = run(stacked, jnp.asarray(start), gradients)
    for layer in range(3):
        alone, _ = run(transform, jnp.asarray(start[layer]), gradients[:, layer])
        # Batched sums have another order; in 8 bits that can change a rounding, which is one step of a code.
        tolerance = 1e-3 if name == "adamw8bitkahan" else 2e-5
        np.testing.assert_allclose(ours[layer], alone, rtol=tolerance, atol=tolerance)
    counters = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 0]
    assert counters
    assert all(leaf == 4 for leaf in counters)


def test_moments_of_bfloat16_parameters_are_float32():
    wide = in_float32(optax.adam(1e-2))
    params, grads = jnp.ones(4, jnp.bfloat16), jnp.full(4, 0.1, jnp.bfloat16)
    state = wide.init(params)
    updates, state = wide.update(grads, state, params)
    # bfloat16(0.1) squared times 0.001, exact to float32: bfloat16 has three digits.
    expected = 0.001 * np.float64(np.asarray(grads, np.float32)[0]) ** 2
    np.testing.assert_allclose(jax.tree.leaves(state)[2], np.full(4, expected), rtol=1e-6)
    assert updates.dtype == jnp.float32  # pyright: ignore[reportAttributeAccessIssue]
