"""The scan over blocks with gradients in place: its gradients are those of a loop, its memory is smaller."""

import jax
import jax.numpy as jnp
import numpy as np

from anima_jax.models.stack import scan_in_place

LAYERS, WIDTH = 6, 256


def arrays():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((LAYERS, WIDTH, WIDTH)).astype(np.float32) / 16
    return weights, rng.standard_normal((2, WIDTH)).astype(np.float32), rng.standard_normal(WIDTH).astype(np.float32)


def layer(x, weight, shift, kind, bias):
    return jnp.tanh(x @ weight + bias + shift) + kind * x


def by_scan(weights, x, bias):
    """Weights, an array that all layers share, and two stacks without a gradient."""
    shifts, kinds = jnp.linspace(0.0, 1.0, LAYERS)[:, None], jnp.arange(LAYERS, dtype=jnp.int32) % 2
    stack = {"weight": weights, "shift": shifts, "kind": kinds}
    run = jax.checkpoint(lambda x, own: layer(x, **own, bias=bias), prevent_cse=False)
    return scan_in_place(run, x, stack)


def by_loop(weights, x, bias):
    for number in range(LAYERS):
        x = layer(x, weights[number], number / (LAYERS - 1), number % 2, bias)
    return x


def test_gradients_are_those_of_a_loop():
    for wanted in ((0, 1, 2), (2,)):
        found, expected = (
            jax.jit(jax.grad(lambda *a, run=run: jnp.sum(run(*a) ** 2), argnums=wanted))(*arrays())
            for run in (by_scan, by_loop)
        )
        for own, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(own, other, rtol=2e-5, atol=2e-5)


def test_the_gradients_take_the_place_of_the_weights_computed_from_parameters():
    def recomputing(weights, x, bias):
        body = jax.checkpoint(lambda x, weight: (layer(x, weight, 0.5, 1, bias), None), prevent_cse=False)
        return jax.lax.scan(body, x, weights)[0]

    def updated(run):
        """The bytes that a step needs beside its arguments and results."""

        def step(weights, x, bias):
            narrow = weights.astype(jnp.bfloat16).astype(jnp.float32)  # a copy, as the cast to the compute dtype is
            grad = jax.grad(lambda weights: jnp.sum(run(weights, x, bias) ** 2))(narrow)
            return weights - grad

        return jax.jit(step, donate_argnums=0).lower(*arrays()).compile().memory_analysis().temp_size_in_bytes

    stack = arrays()[0].nbytes
    assert updated(recomputing) - updated(by_scan) > 0.9 * stack
