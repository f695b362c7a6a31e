"""Noise levels. Oracles: ComfyUI's own for seven shifts (golden/levels), and properties of denoising."""

import numpy as np
import pytest

from anima_jax.diffusion.schedules import SCHEDULES, part, percent_to_sigma, sigma_table, sigmas
from tests.golden_files import golden

DATA = golden("levels")
SHIFTS = DATA["shifts"].tolist()
RECORDED = [key for key in DATA if key.split("|")[0] in SCHEDULES]

# torch's power, exponential and tangent depend on the processor, and are not always the nearest number.
UNITS_IN_THE_LAST_PLACE = dict.fromkeys(SCHEDULES, 0) | {"karras": 1, "exponential": 1, "kl_optimal": 1}


@pytest.mark.parametrize("key", RECORDED)
def test_levels_are_comfyuis_to_the_last_bit(key):
    schedule, steps, denoise, sampler = key.split("|")
    options = {"denoise": float(denoise), "without_penultimate": sampler in ("dpm_2", "uni_pc")}
    for shift, expected in zip(SHIFTS, DATA[key], strict=True):
        found = sigmas(schedule, int(steps), shift, **options)
        np.testing.assert_array_max_ulp(found, expected, UNITS_IN_THE_LAST_PLACE[schedule])
    assert found.dtype == expected.dtype


@pytest.mark.parametrize("index", range(len(SHIFTS)))
def test_the_table_and_fractions_of_the_sampling_are_comfyuis(index):
    np.testing.assert_array_equal(sigma_table(SHIFTS[index]), DATA["table"][index])
    for percent, expected in zip(DATA["percent"].tolist(), DATA["percent_to_sigma"][index], strict=True):
        assert percent_to_sigma(percent, SHIFTS[index]) == expected


@pytest.mark.parametrize("key", [key for key in DATA if key.startswith("part")])
def test_a_part_of_the_steps_has_the_levels_of_ksampler_advanced(key):
    _, start, end, leftover = key.split("|")
    found = part(sigmas("simple", 10), int(start), int(end), leftover_noise=leftover == "True")
    np.testing.assert_array_equal(found, DATA[key])


def test_every_schedule_has_recorded_levels():
    assert {key.split("|")[0] for key in RECORDED} == set(SCHEDULES)


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


@pytest.mark.parametrize(("shift", "last"), [(0.05, True), (0.2, False)])
def test_a_shift_near_zero_leaves_no_step_to_zero(shift, last):
    """`normal` and `ddim_uniform` add no 0 in ComfyUI where their last level is below 0.00001."""
    assert (sigmas("normal", 8, shift)[-1] > 0) == last
    assert len(sigmas("normal", 8, shift)) == 9


def test_partial_denoising_uses_the_last_steps_of_a_longer_schedule():
    np.testing.assert_array_equal(sigmas("karras", 8, denoise=0.4), sigmas("karras", 20)[-9:])
    np.testing.assert_array_equal(sigmas("karras", 8, denoise=0.99995), sigmas("karras", 8))


def test_without_penultimate_drops_that_level_from_one_step_more():
    longer = sigmas("karras", 9)
    np.testing.assert_array_equal(sigmas("karras", 8, without_penultimate=True), [*longer[:-2], 0.0])
