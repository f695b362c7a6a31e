"""Layers that the networks share, against their definitions in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.models.layers import apply_rotary, gelu, silu
from anima_jax.platform import compiling_for

ULP = 2.0**-8
"""Relative spacing of bfloat16 below a power of two; rounding is off by at most half of it above, ULP / 2 · 2."""


def rounding(exact):
    """Half a unit in the last place of bfloat16 at each value, and what float32 loses where 1 + erf cancels."""
    return 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-30))) - 8) + 2e-6


def test_gelu_in_bfloat16_and_its_gradient_are_rounded_once():
    x_b = jnp.linspace(-6, 6, 5001).astype(jnp.bfloat16)
    x = np.asarray(x_b, np.float64)
    cdf = 0.5 * np.array([math.erfc(-value / math.sqrt(2)) for value in x])
    value, backward = jax.jit(lambda x: jax.vjp(gelu, x))(x_b)
    assert [leaf.dtype for leaf in jax.tree.leaves(backward)] == [jnp.bfloat16]  # x itself, and nothing else
    (slope,) = backward(jnp.ones_like(x_b))
    for found, exact in ((value, x * cdf), (slope, cdf + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi))):
        assert np.all(np.abs(np.asarray(found, np.float64) - exact) <= 1.001 * rounding(exact))


def test_gelu_equals_torchs():
    torch = pytest.importorskip("torch")
    values = np.linspace(-6, 6, 2001, dtype=np.float32)
    for dtype in ("float32", "bfloat16"):
        x = torch.tensor(values).to(getattr(torch, dtype)).requires_grad_()
        torch.nn.functional.gelu(x).sum().backward()
        slope = jax.grad(lambda x: jnp.sum(gelu(x).astype(jnp.float32)))(jnp.asarray(values, dtype))
        # Where 1 + erf cancels, the two float32 error functions differ.
        tolerance = {"rtol": ULP if dtype == "bfloat16" else 1e-6, "atol": 2e-6}
        np.testing.assert_allclose(np.asarray(slope, np.float32), x.grad.float().numpy(), **tolerance)


def test_silu_in_bfloat16_is_rounded_once():
    x_b = jnp.linspace(-8, 8, 2001).astype(jnp.bfloat16)
    x = np.asarray(x_b, np.float64)
    exact = x / (1 + np.exp(-x))
    assert np.all(np.abs(np.asarray(silu(x_b), np.float64) - exact) <= 1.001 * rounding(exact))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_tpu_rotates_by_a_product_that_changes_no_number(dtype):
    rng = np.random.default_rng(0)
    x, angles = jnp.asarray(rng.normal(size=(2, 5, 3, 16)), dtype), jnp.asarray(rng.normal(size=(2, 5, 8)), jnp.float32)

    def outputs(x):
        out, backward = jax.vjp(lambda x: apply_rotary(x, angles), x)
        return out, *backward(x)

    expected = outputs(x)
    with compiling_for("tpu"):
        found = outputs(x)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    # As a complex number: (x[i] + i·x[i + k/2])·exp(i·angle); its gradient turns back.
    pairs = np.asarray(x[..., :8], np.float64) + 1j * np.asarray(x[..., 8:], np.float64)
    for one, sign in zip(found, (1j, -1j), strict=True):
        turned = pairs * np.exp(sign * np.asarray(angles, np.float64))[:, :, None]
        exact = np.concatenate([turned.real, turned.imag], axis=-1)
        np.testing.assert_allclose(
            one.astype(np.float32), exact, rtol=ULP if dtype == jnp.bfloat16 else 1e-5, atol=2e-6
        )
