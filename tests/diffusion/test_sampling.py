"""Schedules and samplers against ComfyUI's (golden/samplers, golden/pipeline)."""

import jax.numpy as jnp
import numpy as np
import pytest

from anima_jax.diffusion.samplers import SAMPLERS, sample
from anima_jax.diffusion.schedules import SCHEDULES
from tests.golden_files import VALUE_TOLERANCE, golden, relative_error

DATA = golden("samplers")


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("sigmas.") and key.split(".")[1] in SCHEDULES])
def test_sigmas_equal_comfyuis(key):
    _, schedule, steps = key.split(".")
    np.testing.assert_allclose(SCHEDULES[schedule](int(steps), 3.0), DATA[key], atol=1e-6)


def field(x, sigma):
    """The velocity field that the goldens were sampled on (REFERENCE)."""
    return jnp.tanh(1.3 * x + 0.2) * (0.7 + 0.3 * sigma) - 0.4 * x * jnp.cos(2 * sigma) + 0.1


@pytest.mark.parametrize(
    "key", [key for key in DATA if key.split(".")[0] in SAMPLERS and not key.endswith("step_noise")]
)
def test_samplers_equal_comfyuis(key):
    sampler, schedule, steps = key.split(".")
    result = sample(sampler, field, jnp.asarray(DATA["noise"]), DATA[f"sigmas.{schedule}.{steps}"])
    assert relative_error(result, DATA[key]) < VALUE_TOLERANCE
