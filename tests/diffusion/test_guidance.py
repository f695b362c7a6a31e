"""Guidance. Oracle: ComfyUI's formulas, written out in float64, and their limits."""

import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.diffusion import guidance
from tests.golden_files import relative_error
from tests.models.networks import normal

X, POSITIVE, NEGATIVE = (normal(2, 6, 64, seed=seed).astype(np.float64) for seed in range(3))


def found(scale, zero_star):
    arrays = (jnp.asarray(array, jnp.float32) for array in (X, POSITIVE, NEGATIVE))
    return guidance.guided(*arrays, jnp.float32(scale), jnp.bool_(zero_star))


def test_guidance_extrapolates_and_scale_one_is_the_prompts_estimate():
    assert relative_error(found(4.0, False), NEGATIVE + 4.0 * (POSITIVE - NEGATIVE)) < 1e-6
    assert relative_error(found(1.0, False), POSITIVE) < 1e-6
    assert relative_error(found(1.0, True), POSITIVE) < 1e-6


def test_cfg_zero_star_scales_the_negative_estimate_of_each_image():
    expected = []
    for x, positive, negative in zip(X, POSITIVE, NEGATIVE, strict=True):
        share = np.vdot(x - positive, x - negative) / np.vdot(x - negative, x - negative)
        out = negative + 4.0 * (positive - negative)
        expected.append(out + negative * (share - 1.0) + 4.0 * negative * (1.0 - share))
    assert relative_error(found(4.0, True), expected) < 1e-5


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.0, 1.0), [4, 4, 4, 4]),
        ((0.0, 0.5), [4, 4, 4, 1]),  # half of the sampling ends at 0.75, with a shift of 3
        ((0.5, 1.0), [1, 1, 4, 4]),
        ((0.2, 0.4), [1, 4, 1, 1]),
    ],
)
def test_outside_the_interval_there_is_no_guidance(interval, expected):
    levels = np.array([1.0, 0.9, 0.75, 0.1])
    assert guidance.scale_schedule(levels, 4.0, interval, 3.0).tolist() == expected
