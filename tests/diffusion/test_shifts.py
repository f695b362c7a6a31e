"""Whole samplings at other shifts than 3 and along parts of a schedule: ComfyUI's own levels, noise and formulas.

The oracle is golden/samplers_shifts, where ComfyUI made its levels and drew its noise itself. A level, a time of the
Brownian path or a count that rounds to another value costs far more than the 80 dB that are asked for.
"""

import ast

import numpy as np
import pytest

from anima_jax.diffusion.samplers import SAMPLERS, sampler_plan
from anima_jax.diffusion.schedules import sigmas
from anima_jax.diffusion.step_noise import NoiseKind, StepNoise, initial_noise
from tests.golden_files import golden

DATA = golden("samplers_shifts")
SEED, SHAPE = 5, (1, 4, 1, 2, 3)


def estimate(x, sigma):
    """On the velocity field of golden/samplers."""
    return x - sigma * (np.tanh(1.3 * x + 0.2) * (0.7 + 0.3 * sigma) - 0.4 * x * np.cos(2 * sigma) + 0.1)


def sampled(name, levels, shift):
    """The sampler's result from seed 5; the factors are those of the device, the sums are in float64."""
    row, plan = SAMPLERS[name], sampler_plan(name, levels, shift)
    noise = StepNoise(NoiseKind.parse("torch-cpu"), SEED, SHAPE, row, levels)
    arrays = [initial_noise(SEED, SHAPE) * levels[0]] + [np.zeros(SHAPE)] * (plan.factors_nkj.shape[1] - 1)
    for sigma, factors, drawn in zip(plan.sigmas_n.tolist(), plan.factors_nkj, plan.draw_numbers_nq, strict=True):
        fresh = [noise.next(plan.draws[number]) if number >= 0 else np.zeros(SHAPE) for number in drawn]
        inputs = [*arrays, estimate(arrays[0], sigma), *fresh]
        arrays = [sum(f * array for f, array in zip(row, inputs, strict=True)) for row in factors.astype(np.float64)]
    return arrays[0] / (1.0 - (levels[-1] or row.ends_at))


@pytest.mark.parametrize("key", DATA)
def test_samplings_are_comfyuis(key):
    name, schedule, shift, steps = key.split("|")
    if schedule.startswith("["):
        levels = np.array(ast.literal_eval(schedule), np.float32)
    else:
        without_penultimate = SAMPLERS[name].without_penultimate
        levels = sigmas(schedule, int(steps), float(shift), without_penultimate=without_penultimate)
    error = sampled(name, levels, float(shift)) - DATA[key]
    # 100 dB: ComfyUI's float32 sums of twenty steps, in which SA-Solver's factors amplify rounding most.
    assert 10 * np.log10(np.mean(DATA[key] ** 2) / np.mean(error**2)) > 100
