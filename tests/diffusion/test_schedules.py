"""Noise levels. Oracles: ComfyUI's own (golden/samplers), its formulas for other shifts, properties of denoising."""

import numpy as np
import pytest
from scipy.stats import beta as beta_distribution

from anima_jax.diffusion.schedules import SCHEDULES, sigmas
from tests.golden_files import golden

DATA = golden("samplers")


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("sigmas.")])
def test_levels_equal_comfyuis(key):
    _, schedule, steps = key.split(".")
    np.testing.assert_allclose(sigmas(schedule, int(steps)), DATA[key], atol=1e-6)


def test_every_schedule_except_beta57_has_recorded_levels():
    assert {key.split(".")[1] for key in DATA if key.startswith("sigmas.")} == set(SCHEDULES) - {"beta57"}


def shift(t, s):
    return s * t / (1 + (s - 1) * t)


TABLE = {s: np.array([shift(k / 1000, s) for k in range(1, 1001)]) for s in (1.0, 6.0)}

# (steps, shift) → levels, from the formulas of ComfyUI's schedulers.
FORMULAS = {
    "simple": lambda n, s: [TABLE[s][-(1 + i * 1000 // n)] for i in range(n)],
    "sgm_uniform": lambda n, s: [shift(t, s) for t in np.linspace(1, TABLE[s][0], n + 1)[:-1]],
    "normal": lambda n, s: [shift(t, s) for t in np.linspace(1, TABLE[s][0], n)],
    "karras": lambda n, s: [(1 + i / (n - 1) * (TABLE[s][0] ** (1 / 7) - 1)) ** 7 for i in range(n)],
    "exponential": lambda n, s: [TABLE[s][0] ** (i / (n - 1)) for i in range(n)],
    "ddim_uniform": lambda n, s: [TABLE[s][k] for k in range(1, 1000, 1000 // n)][::-1],
    "beta": lambda n, s: [TABLE[s][int(np.rint(beta_distribution.ppf(1 - i / n, 0.6, 0.6) * 999))] for i in range(n)],
    "beta57": lambda n, s: [TABLE[s][int(np.rint(beta_distribution.ppf(1 - i / n, 0.5, 0.7) * 999))] for i in range(n)],
    "linear_quadratic": lambda n, s: [1 - (0.025 * i / (n // 2)) for i in range(n // 2)],
    "kl_optimal": lambda n, s: [
        np.tan(i / (n - 1) * np.arctan(TABLE[s][0]) + (1 - i / (n - 1)) * np.arctan(1)) for i in range(n)
    ],
}


@pytest.mark.parametrize("shifted_by", [1.0, 6.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_levels_follow_the_formulas_for_other_shifts(schedule, shifted_by):
    expected = FORMULAS[schedule](20, shifted_by)
    found = sigmas(schedule, 20, shifted_by)
    np.testing.assert_allclose(found[: len(expected)], expected, rtol=2e-7)  # float32
    assert found[-1] == 0.0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 3, 50, 1000])
@pytest.mark.parametrize("options", [{}, {"without_penultimate": True}, {"denoise": 0.37}])
def test_levels_descend_from_noise_to_zero(schedule, steps, options):
    found = sigmas(schedule, steps, **options)
    assert found.dtype == np.float32
    assert found[0] <= 1.0
    assert found[-1] == 0.0
    assert np.all(np.diff(found) < 0)
    assert len(found) == steps + 1 or steps == 1000 or schedule == "ddim_uniform"


def test_simple_rounds_the_quotient_as_comfyui_does():
    # int(19 · (1000 / 38)) is 499 in double precision: the 500th level from the top.
    assert sigmas("simple", 38, 1.0)[19] == np.float32(0.501)


def test_partial_denoising_uses_the_last_steps_of_a_longer_schedule():
    np.testing.assert_array_equal(sigmas("karras", 8, denoise=0.4), sigmas("karras", 20)[-9:])
    np.testing.assert_array_equal(sigmas("karras", 8, denoise=0.99995), sigmas("karras", 8))


def test_without_penultimate_drops_that_level_from_one_step_more():
    longer = sigmas("karras", 9)
    np.testing.assert_array_equal(sigmas("karras", 8, without_penultimate=True), [*longer[:-2], 0.0])
